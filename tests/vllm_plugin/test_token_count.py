"""The kernel that counts tokens against the plain count in torch: on a GPU where there is one, else interpreted."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs Triton; not installed")
pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime import token_count
from helix_runtime.proof import ProofWriter
from helix_runtime.sharding import owner
from helix_runtime.vllm_plugin.device_proof import count_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(requests: int, seed: int, kvp: int, kvp_rank: int, interleave: int, padding: int):
    """(slots, starts, positions) of a mixed batch, padded as a captured graph's is; a few tokens on the wrong rank."""
    random = torch.Generator().manual_seed(seed)
    new = torch.randint(1, 9, (requests,), generator=random)
    past = torch.randint(0, 300, (requests,), generator=random)
    positions = torch.cat([torch.arange(int(p), int(p + n)) for p, n in zip(past, new, strict=True)])
    slots = torch.where(owner(positions, kvp, interleave) == kvp_rank, 7 * positions, -1)
    slots[torch.rand(len(slots), generator=random) < 0.1] = 5
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)])
    starts = torch.cat([starts, starts[-1:].expand(padding)]).to(torch.int32)
    return torch.cat([slots, torch.full((padding,), -1)]), starts, torch.cat([positions, positions.new_zeros(padding)])


@pytest.mark.parametrize("kvp, kvp_rank, interleave", [(1, 0, 1), (2, 1, 1), (4, 0, 16), (4, 3, 16), (8, 5, 64)])
@pytest.mark.parametrize("requests, padding", [(1, 0), (3, 5), (64, 0), (700, 300)])
def test_the_kernel_counts_what_torch_counts(requests, padding, kvp, kvp_rank, interleave):
    proof = ProofWriter(None, 0)
    plain = proof.count_on(torch.device("cpu"))
    context = SimpleNamespace(proof=proof, interleave=interleave, kvp=kvp, kvp_rank=kvp_rank)
    found = torch.zeros(len(plain.names), dtype=torch.int64, device=DEVICE)
    group = {"kvp": kvp, "kvp_rank": kvp_rank, "interleave": interleave}
    for seed in range(2):  # counters add up over steps
        step = batch(requests, seed, kvp, kvp_rank, interleave, padding)
        count_tokens(context, *step)
        token_count.count(found, plain.names, *(part.to(DEVICE) for part in step), **group)
    assert found.tolist() == plain.read()

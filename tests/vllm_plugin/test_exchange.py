"""`helix.combine` and `helix.overlap`: what is asked for, what runs, and that it says so."""

import math

import pytest
import torch

from helix_runtime.combine.select import Chosen
from helix_runtime.vllm_plugin import exchange
from helix_runtime.vllm_plugin.options import HelixOptions, helix_options
from helix_runtime.vllm_plugin.refusal import HelixRefusal


def test_the_default_on_cpu_is_ours_in_torch():
    for wanted in ("auto", "torch"):
        _, name = exchange.combine_of("a2a", True, wanted)
        assert name == "helix_runtime.combine.all_to_all.all_to_all_combine"


@pytest.mark.parametrize("wanted", ["triton", "direct", "upstream"])
def test_what_cpu_has_not_falls_back_loudly_and_the_proof_names_it(wanted, caplog):
    _, name = exchange.combine_of("a2a", True, wanted)
    assert name == f"helix_runtime.combine.all_to_all.all_to_all_combine (fell back: there is no '{wanted}' on CPU)"
    assert name in caplog.text


def test_ag_rs_has_one_implementation_and_says_so(caplog):
    _, name = exchange.combine_of("ag_rs", True, "triton")
    assert name.endswith("all_gather_reduce_scatter_combine (fell back: ag_rs has only this one)")


@pytest.mark.parametrize(
    "given, named",
    [
        ({"combine": "nccl"}, "allowed: auto, upstream, torch, triton, direct"),
        ({"overlap": 0}, "allowed: 1 (off) or more"),
    ],
)
def test_mistakes_name_what_is_allowed(given, named):
    with pytest.raises(HelixRefusal) as refusal:
        helix_options({"helix": given})
    assert named in str(refusal.value)


class Group:
    world_size = 2


@pytest.mark.parametrize("natural, returned", [(True, 2.0), (False, 2.0 / math.log(2.0))])
def test_ours_in_place_of_vllms_keeps_its_contract(natural, returned, monkeypatch):
    """vLLM hands base 2 in and wants base 2 out; our combines return natural logarithms."""
    asked = {}

    def combine(output, lse, **options):
        asked.update(options, lse=lse)
        return output[:, :1], torch.full((3, 1), 2.0)

    monkeypatch.setattr(exchange, "_chosen", lambda wanted: Chosen("triton", combine))
    replaced = exchange._replacement(lambda *arguments: "upstream", "triton")
    output, lse, lengths = torch.ones(3, 2, 64), torch.zeros(3, 2), torch.tensor([1, 0, 2])
    starts = torch.tensor([0, 1, 2, 3])
    merged, merged_lse = replaced(
        output, lse, Group(), return_lse=True, is_lse_base_on_e=natural, seq_lens=lengths, query_start_loc=starts
    )
    assert merged.shape == (3, 1, 64) and merged_lse[0, 0].item() == pytest.approx(returned)
    assert asked["lse_base"] == ("e" if natural else "2")
    assert asked["lengths"] is lengths and asked["query_start_loc"] is starts
    assert torch.equal(replaced(output, lse, Group()), output[:, :1])
    assert replaced(output.double(), lse, Group()) == "upstream"


def test_a_decode_batch_in_micro_batches_is_the_same_numbers():
    from helix_runtime.attention.reference import paged_partial_attention
    from helix_runtime.vllm_plugin.cpu_attention import _overlapped

    class Proof:
        counted = 0

        def overlapped(self):
            self.counted += 1

    class Context:
        micro_batches, proof = 3, Proof()

        @staticmethod
        def combine(output, lse):
            return output + lse.unsqueeze(-1)

    cache = torch.randn(6, 2, 4, 16)
    read = {
        "query": torch.randn(5, 4, 8),
        "key_cache": cache[..., :8],
        "value_cache": cache[..., 8:],
        "block_table": torch.tensor([[0], [1], [2], [3], [4]], dtype=torch.int32),
        "query_start_loc": torch.arange(6, dtype=torch.int32),
        "seq_lens": torch.tensor([4, 1, 3, 2, 4], dtype=torch.int32),
        "scale": 0.3,
    }
    common = {"kvp": 1, "kvp_rank": 0, "interleave": 1, "softcap": None}
    merged = torch.empty(5, 4, 8)
    assert _overlapped(Context(), read, read["seq_lens"], common, merged) == 3
    whole = Context.combine(*paged_partial_attention(**read, local_seq_lens=read["seq_lens"], **common))
    torch.testing.assert_close(merged, whole)
    assert Context.proof.counted == 3


@pytest.mark.parametrize(
    ("changed", "meant"),
    [
        ({}, "direct"),
        ({"mode": "FULL_AND_PIECEWISE"}, "direct"),
        ({"mode": "PIECEWISE"}, "upstream"),
        ({"backend": "FLASHINFER"}, "upstream"),
        ({"backend": None}, "upstream"),
        ({"backend": "FLASHMLA", "mla": True}, "upstream"),
        ({"comm": "ag_rs"}, "upstream"),
        ({"share_gpu": True}, "upstream"),
        ({"helix_mode": False}, "upstream"),  # standard DCP stays stock
        ({"combine": "upstream"}, "upstream"),
        ({"combine": "triton", "mode": "FULL"}, "triton"),
    ],
)
def test_auto_on_cuda_is_ours_where_cells_have_judged_it(changed, meant):
    asked = {"mla": False, "backend": "FLASH_ATTN", "comm": "a2a", "mode": None} | changed
    mla, backend, comm, mode = (asked.pop(name) for name in ("mla", "backend", "comm", "mode"))
    options = HelixOptions(**{"helix_mode": True} | asked)
    assert exchange.meant_on_cuda(options, mla, backend, comm, mode).combine == meant

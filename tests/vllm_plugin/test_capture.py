"""Localisation on two shards held in one process: a right merge passes, a wrong one names its layer, head and token."""

import json
from types import SimpleNamespace

import pytest
import torch

from helix_runtime.attention import paged_partial_attention
from helix_runtime.combine.merge import merge_partials
from helix_runtime.sharding import local_length, slot_mapping
from helix_runtime.vllm_plugin.capture import TOLERANCE, Capture
from helix_runtime.vllm_plugin.faults import Site, make_fault

KVP, BLOCK, HEADS, KV_HEADS, WIDTH, INTERLEAVE = 2, 4, 4, 2, 8, 2
LENGTHS, NEW = [11, 3], [1, 3]  # a decode and a prefill in one batch
SCALE = WIDTH**-0.5


@pytest.fixture
def shards():
    """Both ranks' caches of one layer, their partials, and what each rank's capture needs."""
    torch.manual_seed(0)
    table = torch.tensor([[2, 1], [3, 0]])
    starts = torch.tensor([0, 1, 4])
    query = torch.randn(4, HEADS, WIDTH)
    caches = [torch.full((4, KV_HEADS, BLOCK, 2 * WIDTH), float("nan")) for _ in range(KVP)]
    for request, length in enumerate(LENGTHS):
        kv = torch.randn(length, KV_HEADS, 2 * WIDTH)
        for rank, cache in enumerate(caches):
            slots = slot_mapping(
                torch.arange(length), table[request : request + 1], torch.tensor([0, length]),
                block_size=BLOCK, kvp=KVP, kvp_rank=rank, interleave=INTERLEAVE,
            )  # fmt: skip
            mine = slots >= 0
            cache[slots[mine] // BLOCK, :, slots[mine] % BLOCK] = kv[mine]
    calls = [
        {
            "query": query, "key_cache": cache[..., :WIDTH], "value_cache": cache[..., WIDTH:], "block_table": table,
            "query_start_loc": starts, "seq_lens": torch.tensor(LENGTHS), "scale": SCALE,
        }
        for cache in caches
    ]  # fmt: skip
    partials = [
        paged_partial_attention(**call, kvp=KVP, kvp_rank=rank, interleave=INTERLEAVE)
        for rank, call in enumerate(calls)
    ]
    return calls, partials


def at(layer: int, kvp_rank: int) -> Site:
    return Site(layer=layer, kvp_rank=kvp_rank, requests=2, decode=False, reads_context=False, first_head=8)


def captured(shards, tmp_path, kvp_rank: int, merged: torch.Tensor, layer: int = 5) -> Capture:
    calls, _ = shards
    held = [
        Capture(tmp_path, rank, lambda value: value, torch.float32)._gather(
            context(rank), calls[rank]["key_cache"], calls[rank]["value_cache"], calls[rank]["block_table"],
            calls[rank]["seq_lens"],
        )
        for rank in range(KVP)
    ]  # fmt: skip
    capture = Capture(tmp_path, kvp_rank, lambda value: held, torch.float32)
    capture.check(context(kvp_rank), at(layer, kvp_rank), **calls[kvp_rank], merged=merged)
    return capture


def context(kvp_rank: int):
    return SimpleNamespace(kvp=KVP, kvp_rank=kvp_rank, interleave=INTERLEAVE)


def right(shards, kvp_rank: int) -> torch.Tensor:
    _, partials = shards
    merged, _ = merge_partials(torch.stack([p[0] for p in partials]), torch.stack([p[1] for p in partials]))
    each = HEADS // KVP
    return merged[:, kvp_rank * each : (kvp_rank + 1) * each].clone()


@pytest.mark.parametrize("kvp_rank", range(KVP))
def test_a_right_merge_is_far_below_the_tolerance(shards, tmp_path, kvp_rank):
    capture = captured(shards, tmp_path, kvp_rank, right(shards, kvp_rank))
    assert capture.first is None and capture.calls == 1
    capture = captured(shards, tmp_path, kvp_rank, right(shards, kvp_rank) * (1 + TOLERANCE[torch.float32] / 20))
    assert capture.first is None


def test_a_wrong_head_of_one_token_is_named(shards, tmp_path):
    merged = right(shards, 1)
    merged[2, 1] += 0.5  # token 2 of the batch is position 1 of request 1; the second of rank 1's owned heads
    first = captured(shards, tmp_path, 1, merged).first
    assert (first.layer, first.head, first.rank, first.request, first.position) == (5, 8 + 2 + 1, 1, 1, 1)
    assert json.loads((tmp_path / "capture.rank1.json").read_text())["first"]["head"] == 11


@pytest.mark.parametrize(("layer", "head", "rank"), [(1, 11, 1), (2, 8, 0), (0, 10, 1)])
def test_a_deliberate_defect_of_one_head_of_one_layer_is_found_there_alone(shards, tmp_path, layer, head, rank):
    """Heads 8 to 11 are computed here; of these rank 0 owns 8 and 9, rank 1 the others."""
    calls, partials = shards
    armed = make_fault(f"drop-shard:layer={layer},head={head}")
    for where in range(3):
        sites = [at(where, kvp_rank) for kvp_rank in range(KVP)]
        sent = [armed.at(site).partial(*partial, site) for site, partial in zip(sites, partials, strict=True)]
        for owner in range(KVP):
            found = captured((calls, sent), tmp_path, owner, right((calls, sent), owner), where).first
            if (where, owner) == (layer, rank):
                assert (found.layer, found.head, found.rank) == (layer, head, rank)
            else:
                assert found is None


def test_nan_is_a_deviation(shards, tmp_path):
    merged = right(shards, 0)
    merged[0, 0, 0] = float("nan")
    assert captured(shards, tmp_path, 0, merged).first.request == 0


def test_the_batch_has_both_full_and_empty_shards():
    counts = [[local_length(length, KVP, rank, INTERLEAVE) for rank in range(KVP)] for length in LENGTHS]
    assert counts == [[6, 5], [2, 1]]


# MLA prefill: a rank attends with its own heads only, whose keys and values are up-projections of the latents.

LATENT, ROPE, NOPE, VALUE, OWNED = 6, 2, 4, 3, 2


@pytest.fixture
def latents():
    """The latents of one request, its block table, both shards [blocks, 1, block, LATENT + ROPE], rank 1's weights."""
    torch.manual_seed(1)
    whole = torch.randn(11, LATENT + ROPE)
    table, caches = torch.tensor([[1, 0]]), []
    for rank in range(KVP):
        cache = torch.full((2, 1, BLOCK, LATENT + ROPE), float("nan"))
        slots = slot_mapping(
            torch.arange(11), table, torch.tensor([0, 11]), block_size=BLOCK, kvp=KVP, kvp_rank=rank,
            interleave=INTERLEAVE,
        )  # fmt: skip
        mine = slots >= 0
        cache[slots[mine] // BLOCK, 0, slots[mine] % BLOCK] = whole[mine]
        caches.append(cache)
    return whole, table, caches, torch.randn(OWNED * (NOPE + VALUE), LATENT)


def prefilled(latents, tmp_path, spoil: float = 0.0) -> Capture:
    """Rank 1's check of the last 4 of 11 tokens, whose right output is worked out head by head and token by token."""
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from helix_runtime.vllm_plugin.cpu_mla import HelixCPUMLAImpl

    whole, table, caches, weight = latents
    query = torch.randn(4, OWNED, NOPE + ROPE)
    merged = torch.zeros(4, OWNED, VALUE)
    for head in range(OWNED):
        up = whole[:, :LATENT] @ weight[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)].T
        keys = torch.cat([up[:, :NOPE], whole[:, LATENT:]], dim=1)
        for token in range(4):
            seen = 11 - 4 + token + 1
            shares = (keys[:seen] @ query[token, head] * SCALE).softmax(dim=0)
            merged[token, head] = shares @ up[:seen, NOPE:]
    merged[2, 1] += spoil

    impl = SimpleNamespace(
        kv_b_proj=SimpleNamespace(weight=weight), num_heads=OWNED, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
    )  # fmt: skip
    held = [
        Capture(tmp_path, rank, lambda value: value, torch.float32)._gather(
            context(rank), cache, cache[..., :LATENT], table, torch.tensor([11])
        )
        for rank, cache in enumerate(caches)
    ]
    capture = Capture(tmp_path, 1, lambda value: held, torch.float32)
    capture.check(
        context(1), Site(layer=0, kvp_rank=1, requests=1, decode=False, reads_context=True, first_head=0), query,
        caches[1], caches[1][..., :LATENT], table, torch.tensor([0, 4]), torch.tensor([11]), SCALE, merged,
        expand=lambda keys, values: HelixCPUMLAImpl._expand(impl, keys, values),
    )  # fmt: skip
    return capture


def test_a_right_mla_prefill_passes(latents, tmp_path):
    assert prefilled(latents, tmp_path).first is None


def test_a_wrong_head_of_an_mla_prefill_is_named(latents, tmp_path):
    first = prefilled(latents, tmp_path, spoil=0.5).first
    # the second of rank 1's owned heads, which are 2 and 3; token 2 of 4 new ones after 7
    assert (first.head, first.position, first.rank, first.decode) == (3, 9, 1, False)

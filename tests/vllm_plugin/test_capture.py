"""Localisation on two shards held in one process: a right merge passes, a wrong one names its layer, head and token."""

import json
from types import SimpleNamespace

import pytest
import torch

from helix_runtime.attention import paged_partial_attention
from helix_runtime.combine.merge import merge_partials
from helix_runtime.sharding import local_length, slot_mapping
from helix_runtime.vllm_plugin.capture import TOLERANCE, Capture
from helix_runtime.vllm_plugin.faults import Site

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


def captured(shards, tmp_path, kvp_rank: int, merged: torch.Tensor) -> Capture:
    calls, _ = shards
    held = [
        Capture(tmp_path, rank, lambda value: value, torch.float32)._gather(
            context(rank), calls[rank]["key_cache"], calls[rank]["value_cache"], calls[rank]["block_table"],
            calls[rank]["seq_lens"],
        )
        for rank in range(KVP)
    ]  # fmt: skip
    capture = Capture(tmp_path, kvp_rank, lambda value: held, torch.float32)
    site = Site(layer=5, kvp_rank=kvp_rank, requests=2, decode=False, reads_context=False, first_head=8)
    capture.check(context(kvp_rank), site, **calls[kvp_rank], merged=merged)
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


def test_nan_is_a_deviation(shards, tmp_path):
    merged = right(shards, 0)
    merged[0, 0, 0] = float("nan")
    assert captured(shards, tmp_path, 0, merged).first.request == 0


def test_the_batch_has_both_full_and_empty_shards():
    counts = [[local_length(length, KVP, rank, INTERLEAVE) for rank in range(KVP)] for length in LENGTHS]
    assert counts == [[6, 5], [2, 1]]

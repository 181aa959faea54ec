"""Ownership, lengths, positions and slots of interleaved shards, against hand-computed values and brute force."""

import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch

from helix_runtime.sharding import (
    PAD_SLOT,
    global_position,
    global_positions,
    local_index,
    local_length,
    local_lengths,
    misplaced,
    owner,
    slot_mapping,
)

GRID = [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 16))]  # (kvp, interleave)


def test_hand_computed_ownership():
    # kvp 2, interleave 2: positions 0 1 | 2 3 | 4 5 | 6 7 go to ranks 0 | 1 | 0 | 1.
    assert [owner(p, 2, 2) for p in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [local_index(p, 2, 2) for p in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert global_positions(5, kvp=2, kvp_rank=1, interleave=2).tolist() == [2, 3, 6, 7, 10]
    assert [local_length(5, 2, rank, 2) for rank in (0, 1)] == [3, 2]
    assert [local_length(7, 2, rank, 2) for rank in (0, 1)] == [4, 3]
    # Interleave 1 deals one by one: 10 tokens to 4 ranks.
    assert [local_length(10, 4, rank) for rank in range(4)] == [3, 3, 2, 2]
    # 100 tokens, runs of 16 to 4 ranks: 64 in the first round, then 16, 16, 4, 0.
    assert [local_length(100, 4, rank, 16) for rank in range(4)] == [32, 32, 20, 16]


@pytest.mark.parametrize(("kvp", "interleave"), GRID)
def test_lengths_and_positions_by_dealing_out_tokens(kvp, interleave):
    hands = [[] for _ in range(kvp)]
    for length in range(2 * interleave * kvp + 3):
        for rank, hand in enumerate(hands):
            assert local_length(length, kvp, rank, interleave) == len(hand)
            assert global_positions(len(hand), kvp=kvp, kvp_rank=rank, interleave=interleave).tolist() == hand
        dealt_to = length // interleave % kvp
        assert owner(length, kvp, interleave) == dealt_to
        assert local_index(length, kvp, interleave) == len(hands[dealt_to])
        assert global_position(len(hands[dealt_to]), kvp=kvp, kvp_rank=dealt_to, interleave=interleave) == length
        hands[dealt_to].append(length)


@pytest.mark.parametrize(("kvp", "interleave"), GRID)
def test_a_shard_is_empty_exactly_up_to_interleave_times_rank(kvp, interleave):
    for rank in range(kvp):
        first = interleave * rank
        assert local_length(first, kvp, rank, interleave) == 0
        assert local_length(first + 1, kvp, rank, interleave) == 1


@pytest.mark.parametrize(("kvp", "interleave"), GRID)
def test_tensor_lengths_equal_the_scalar_ones(kvp, interleave):
    lengths = torch.arange(3 * kvp * interleave, dtype=torch.int32).view(3, -1)
    for rank in range(kvp):
        found = local_lengths(lengths, kvp, rank, interleave)
        assert found.dtype == torch.int32 and found.shape == lengths.shape
        assert found.flatten().tolist() == [local_length(n, kvp, rank, interleave) for n in lengths.flatten().tolist()]


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="-1 is negative"):
        owner(-1, 4)
    with pytest.raises(ValueError, match="-1 is negative"):
        local_index(-1, 4)
    with pytest.raises(ValueError, match="-3 is negative"):
        local_length(-3, 4, 0)
    with pytest.raises(ValueError, match="kvp_rank 4 is not one of the 4 ranks"):
        local_length(3, 4, 4)
    with pytest.raises(ValueError, match="interleave 0"):
        local_length(3, 4, 0, 0)


def test_hand_computed_slots():
    # Two requests, blocks of 4 on 2 ranks with interleave 2: block i of a row holds positions [8 i, 8 i + 8).
    block_table = torch.tensor([[7, 3], [5, 9]], dtype=torch.int32)
    # Request 0 decodes position 9 (round 2, first pair, second of it: rank 0, index 5, block 1 -> id 3, offset 1).
    # Request 1 prefills positions 0..5.
    positions = torch.tensor([9, 0, 1, 2, 3, 4, 5, 0, 0])
    query_start_loc = torch.tensor([0, 1, 7], dtype=torch.int32)
    ranks = [
        slot_mapping(positions, block_table, query_start_loc, block_size=4, kvp=2, kvp_rank=rank, interleave=2).tolist()
        for rank in (0, 1)
    ]
    assert ranks[0] == [3 * 4 + 1, 20, 21, PAD_SLOT, PAD_SLOT, 22, 23, PAD_SLOT, PAD_SLOT]
    assert ranks[1] == [PAD_SLOT, PAD_SLOT, PAD_SLOT, 20, 21, PAD_SLOT, PAD_SLOT, PAD_SLOT, PAD_SLOT]


@pytest.mark.parametrize(("kvp", "interleave", "block_size"), [(1, 1, 4), (2, 1, 4), (4, 4, 4), (3, 2, 8), (8, 16, 16)])
def test_slots_of_a_whole_sequence_fill_each_shard_once(kvp, interleave, block_size):
    blocks = 3
    row = torch.tensor([[4, 0, 2]])
    length = blocks * block_size * kvp
    shared = dict(block_size=block_size, kvp=kvp, interleave=interleave)
    ends = torch.tensor([0, length])
    slots = torch.stack([slot_mapping(torch.arange(length), row, ends, kvp_rank=r, **shared) for r in range(kvp)])
    assert ((slots != PAD_SLOT).sum(0) == 1).all(), "every token has exactly one owner"
    expected = [block * block_size + offset for block in (4, 0, 2) for offset in range(block_size)]
    for rank in range(kvp):
        assert slots[rank][slots[rank] != PAD_SLOT].tolist() == expected, "in order of position, without gaps"
        # A later chunk gets the same slots as the whole.
        cut = length // 2 + 1
        ends_of_chunk = torch.tensor([0, length - cut])
        chunk = slot_mapping(torch.arange(cut, length), row, ends_of_chunk, kvp_rank=rank, **shared)
        assert chunk.tolist() == slots[rank][cut:].tolist()


def test_slots_go_into_a_longer_buffer_padded():
    out = torch.full((6,), 99)
    found = slot_mapping(
        torch.arange(2), torch.tensor([[1]]), torch.tensor([0, 2]), block_size=4, kvp=1, kvp_rank=0, out=out
    )
    assert found is out
    assert out.tolist() == [4, 5, PAD_SLOT, PAD_SLOT, PAD_SLOT, PAD_SLOT]


def test_slots_refuse_an_interleave_that_straddles_blocks():
    with pytest.raises(ValueError, match="interleave 3 does not divide the block size 4"):
        slot_mapping(
            torch.arange(2), torch.tensor([[1]]), torch.tensor([0, 2]), block_size=4, kvp=2, kvp_rank=0, interleave=3
        )


def test_scalar_functions_need_no_torch():
    program = """
import sys
sys.modules["torch"] = None  # importing torch now fails
from helix_runtime.sharding import local_length, owner
assert owner(5, 2, 2) == 0 and local_length(5, 2, 1, 2) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: nothing to compare with")
def test_local_lengths_equal_vllm():
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    lengths = torch.arange(300, dtype=torch.int32)
    for kvp, interleave in GRID:
        theirs = get_dcp_local_seq_lens(lengths, kvp, None, interleave)
        for rank in range(kvp):
            assert torch.equal(theirs[:, rank], local_lengths(lengths, kvp, rank, interleave)), (kvp, rank, interleave)


def test_misplaced_tokens_by_hand():
    """Interleave 2, two ranks: rank 1 owns positions 2, 3, 6, 7."""
    positions = torch.tensor([1, 2, 3, 4, 6])
    right = torch.tensor([-1, 8, 9, -1, 10])
    wrong = torch.tensor([7, 8, -1, -1, 10])  # 1 is rank 0's, 3 is missing
    group = {"kvp": 2, "kvp_rank": 1, "interleave": 2}
    assert not misplaced(right, positions, **group).any()
    assert misplaced(wrong, positions, **group).tolist() == [True, False, True, False, False]

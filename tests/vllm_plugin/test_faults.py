"""Where a fault strikes, and what it does to a partial."""

import math

import pytest
import torch

from helix_runtime.combine.collectives import Collectives
from helix_runtime.combine.merge import merge_partials
from helix_runtime.sharding import slot_mapping
from helix_runtime.vllm_plugin import fault_cache, fault_merge
from helix_runtime.vllm_plugin.faults import FAULTS, NO_FAULT, Fault, Reading, Site, Writing, make_fault
from helix_runtime.vllm_plugin.refusal import HelixRefusal


def site(**changes) -> Site:
    usual = {"layer": 0, "kvp_rank": 1, "requests": 1, "decode": True, "reads_context": False, "first_head": 0}
    return Site(**{**usual, **changes})


@pytest.mark.parametrize(
    ("spec", "strikes", "spares"),
    [
        ("drop-shard", {}, None),
        ("drop-shard:layer=1", {"layer": 1}, {"layer": 0}),
        ("drop-shard:rank=1", {"kvp_rank": 1}, {"kvp_rank": 0}),
        ("drop-shard:batch", {"requests": 2}, {"requests": 1}),
        ("drop-shard:single", {"requests": 1}, {"requests": 2}),
        ("drop-shard:decode", {"decode": True}, {"decode": False}),
        ("drop-shard:prefill", {"decode": False}, {"decode": True}),
        ("drop-shard:prefix", {"decode": False, "reads_context": True}, {"decode": False}),
    ],
)
def test_conditions(spec, strikes, spares):
    armed = make_fault(spec)
    assert armed.at(site(**strikes)) is not NO_FAULT
    if spares is not None:
        assert armed.at(site(**spares)) is NO_FAULT


def test_every_third_call_and_however_often_it_is_asked():
    """Calls 3 and 6 of a layer's attention; a choice of slots (layer -1) between them is no call of attention."""
    armed = make_fault("drop-shard:call=3")
    struck = []
    for call in range(1, 8):
        slots, here = site(layer=-1), site(layer=call % 2)
        armed.at(slots)
        struck += [call] * (armed.at(here) is not NO_FAULT and armed.at(here) is armed.fault)
    assert struck == [3, 6]


@pytest.mark.parametrize(
    ("spec", "arrives"),
    [
        ("swap-chunks", [1, 0, 2, 3]),
        ("swap-last-chunks", [0, 1, 3, 2]),
        ("rotate-chunks", [1, 2, 3, 0]),
    ],
)
def test_whose_chunk_each_of_four_ranks_gets(spec, arrives):
    """An exchange that hands over what it is given shows in which order chunks leave."""

    def exchange(output, input, *, group):
        output.copy_(input)

    given = Collectives(all_to_all=exchange, all_gather=exchange, reduce_scatter=exchange)
    wrong, output = make_fault(spec).fault.collectives(given), torch.empty(4, 2)
    for name, order in (("all_to_all", arrives), ("reduce_scatter", arrives), ("all_gather", [0, 1, 2, 3])):
        getattr(wrong, name)(output, torch.arange(4.0)[:, None].expand(4, 2), group=None)
        assert output[:, 0].tolist() == order


def test_a_worker_that_dies_dies_in_the_call_that_is_named():
    armed = make_fault("dies:call=2")
    first, second = site(), site(layer=3)
    armed.at(first).partial(torch.zeros(1, 1, 1), torch.zeros(1, 1), first)
    with pytest.raises(RuntimeError, match="KVP rank 1 dies in layer 3"):
        armed.at(second).partial(torch.zeros(1, 1, 1), torch.zeros(1, 1), second)


def test_no_fault_changes_nothing():
    output, lse = torch.randn(2, 4, 3), torch.randn(2, 4)
    same_output, same_lse = make_fault(None).at(site()).partial(output, lse, site())
    assert same_output is output and same_lse is lse


def test_one_head_only():
    output, lse = torch.randn(2, 4, 3), torch.randn(2, 4)
    where = site(first_head=8)
    _, struck = make_fault("drop-shard:head=10").at(where).partial(output, lse, where)
    assert torch.isinf(struck[:, 2]).all()
    assert torch.equal(struck[:, [0, 1, 3]], lse[:, [0, 1, 3]])
    elsewhere = site(first_head=0)
    _, spared = make_fault("drop-shard:head=10").at(elsewhere).partial(output, lse, elsewhere)
    assert torch.equal(spared, lse)


def test_one_head_of_one_layer_only():
    output, lse = torch.randn(2, 4, 3), torch.randn(2, 4)
    armed = make_fault("drop-shard:layer=1,head=10")
    struck, spared = site(layer=1, first_head=8), site(layer=0, first_head=8)
    _, wrong = armed.at(struck).partial(output, lse, struck)
    assert torch.isinf(wrong).all(0).tolist() == [False, False, True, False]
    assert armed.at(spared) is NO_FAULT


def test_stale_lse_is_that_of_the_call_before():
    fault = make_fault("stale-lse").at(site())
    output = torch.randn(2, 4, 3)
    first, second, other = torch.randn(2, 4), torch.randn(2, 4), torch.randn(5, 4)
    assert torch.equal(fault.partial(output, first, site())[1], first)
    assert torch.equal(fault.partial(output, second, site())[1], first)
    assert torch.equal(fault.partial(output, other, site())[1], other)  # another shape: nothing stale fits


@pytest.mark.parametrize(
    "spec",
    [
        "typo",
        "drop-shard:never",
        "drop-shard:layer=x",
        "lse-base-2:head=1",
        "no-combine:call=0",
        "drop-shard:layer=1,",
        "drop-shard:,batch",
        "lse-base-2:batch,head=1",
    ],
)
def test_unknown_words_list_the_known(spec):
    with pytest.raises(HelixRefusal, match=r"there are: dies, double-shard, drop-shard|allowed: batch"):
        make_fault(spec)


def test_there_are_enough_faults_and_each_says_what_it_is():
    assert len(FAULTS) >= 28
    assert all(kind.__doc__ for kind in FAULTS.values())


def decode(*lengths: int, **changes) -> Site:
    """A decode batch of sequences that are `lengths` long, the new token included."""
    starts = torch.arange(len(lengths) + 1)
    return site(requests=len(lengths), seq_lens=torch.tensor(lengths), query_start_loc=starts, **changes)


def test_only_tokens_at_some_positions():
    output, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    where = decode(100, 101, 200)  # new tokens at positions 99, 100, 199
    for spec, struck in (("every=100", [0, 2]), ("beyond=100", [1, 2]), ("beyond=200", [])):
        _, wrong = make_fault(f"drop-shard:{spec}").at(where).partial(output, lse, where)
        assert torch.isinf(wrong).all(1).nonzero().flatten().tolist() == struck, spec


def test_only_lengths_of_some_tokens():
    where = decode(128, 129, kvp_rank=0)
    fault = make_fault("local-length-off-by-one:beyond=128").at(where)
    assert fault.local_lengths(torch.tensor([64, 65]), where).tolist() == [64, 64]


def test_positions_of_a_mixed_batch():
    where = site(seq_lens=torch.tensor([7, 3]), query_start_loc=torch.tensor([0, 1, 4]))
    assert where.positions().tolist() == [6, 0, 1, 2]


def writing(positions: list[int], kvp_rank: int) -> Writing:
    """Two ranks, runs of 2, blocks of 4; the sequence lies in blocks 5 and 6."""
    table, starts = torch.tensor([[5, 6]]), torch.tensor([0, len(positions)])

    def slot_of(where: torch.Tensor) -> torch.Tensor:
        return slot_mapping(where, table, starts, block_size=4, kvp=2, kvp_rank=kvp_rank, interleave=2)

    at = torch.tensor(positions)
    return Writing(slot_of(at), at, block_size=4, interleave=2, kvp=2, slot_of=slot_of)


def test_owner_off_by_one_moves_the_last_token_of_each_run():
    fault = fault_cache.OwnerOffByOne()
    right = writing([0, 1, 2, 3, 4], kvp_rank=0)
    assert right.slots.tolist() == [20, 21, -1, -1, 22]  # rank 0 owns 0, 1, 4, 5
    # Position 1 goes where 2 belongs (rank 1), position 3 where 4 belongs (rank 0), over which 4 is then written.
    assert fault.slots(right, site()).tolist() == [20, -1, -1, 22, 22]
    assert fault.slots(writing([0, 1, 2, 3, 4], kvp_rank=1), site()).tolist() == [-1, 20, 20, -1, -1]


def test_owner_of_decode_off_by_one_spares_prefill():
    fault = fault_cache.OwnerOfDecodeOffByOne()
    assert fault.slots(writing([4], kvp_rank=0), site(decode=True)).tolist() == [-1]
    assert fault.slots(writing([4], kvp_rank=1), site(decode=True)).tolist() == [21]
    assert fault.slots(writing([4], kvp_rank=0), site(decode=False)).tolist() == [22]
    assert fault.slots(writing([5], kvp_rank=0), site(decode=True)).tolist() == [23]


def test_stale_reuse_spares_the_first_writing():
    fault = fault_cache.StaleReuse()
    first = writing([0, 1], kvp_rank=0)
    assert fault.slots(first, site()).tolist() == [20, 21]
    assert fault.slots(first, site()).tolist() == [-1, 21]  # 20 begins a block, and was written before


def test_double_shard_weighs_twice():
    fault = fault_merge.DoubleShard()
    output, lse = fault.partial(torch.ones(1, 1, 2), torch.zeros(1, 1), site(kvp_rank=0))
    merged, _ = merge_partials(torch.stack([output, torch.zeros(1, 1, 2)]), torch.stack([lse, torch.zeros(1, 1)]))
    assert merged[0, 0].tolist() == pytest.approx([2 / 3, 2 / 3])  # right: 1 / 2


def test_merges_that_go_wrong():
    outputs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    lses = torch.tensor([math.log(3.0), 0.0]).view(2, 1, 1)  # right: (3 * 1 + 1 * 3) / 4 = 1.5
    assert merge_partials(outputs, lses)[0].item() == pytest.approx(1.5)
    assert fault_merge.LseOfOtherRank().merge(outputs, lses, "e")[0].item() == pytest.approx((1 + 9) / 4)
    assert fault_merge.UnnormalisedMerge().merge(outputs, lses, "e")[0].item() == pytest.approx(1 + 3 / 3)
    output, lse = fault_merge.EqualWeights().partial(outputs[0], lses[0], site())
    assert (output.item(), lse.item()) == (1.0, 0.0)


def test_lses_of_fewer_bits():
    output, lse = torch.zeros(1, 2, 1), torch.tensor([[1.0 + 2.0**-9, -math.inf]])
    assert fault_merge.LseInFp16().partial(output, lse, site())[1].tolist() == lse.tolist()
    assert fault_merge.LseInBf16().partial(output, lse, site())[1].tolist() == [[1.0, -math.inf]]
    right = torch.tensor([[1.0, 3.0], [-math.inf, 0.5]])
    flipped = fault_merge.LseLastBit().partial(output, right, site(kvp_rank=1))[1]
    assert (flipped - right).tolist()[0] == [2.0**-23, 2.0**-22]
    assert flipped[1, 0] == -math.inf


def test_empty_shards():
    output, lse = torch.zeros(1, 2, 1), torch.tensor([[-math.inf, 1.0]])
    assert fault_merge.EmptyShardCounts().partial(output, lse, site())[1].tolist() == [[0.0, 1.0]]
    wrong_output, wrong_lse = fault_merge.EmptyShardNan().partial(output, lse, site())
    assert wrong_lse.isnan().tolist() == [[True, False]] and wrong_output.isnan().flatten().tolist() == [True, False]


def test_stale_partials_are_those_of_the_same_layer():
    fault = fault_merge.StaleShard()
    first, second = torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0)
    lse = torch.zeros(1, 2)
    assert torch.equal(fault.partial(first, lse, site(layer=0))[0], first)
    assert torch.equal(fault.partial(second, lse, site(layer=1))[0], second)
    assert torch.equal(fault.partial(second, lse, site(layer=0))[0], first)


def test_rows_heads_and_readings():
    output = torch.arange(3.0).view(3, 1, 1)
    assert fault_merge.LastRowRepeats().merged(output, site()).flatten().tolist() == [0, 1, 1]
    assert fault_merge.HeadOffByOne().merged(output.view(1, 3, 1), site()).flatten().tolist() == [2, 0, 1]
    reading = Reading(torch.arange(2.0).view(1, 2, 1), torch.tensor([[1], [2]]), 0.5)
    assert fault_cache.ReadsNeighbourBlocks().reads(reading, site()).block_table.tolist() == [[2], [1]]
    assert fault_cache.WrongScale().reads(reading, site()).scale == pytest.approx(0.5 * math.sqrt(8 / 9))
    assert fault_cache.QueryHeadOffByOne().reads(reading, site()).query.flatten().tolist() == [1, 0]


def test_a_fault_without_a_hook_is_none():
    """Every registered fault overrides something, so that none is armed and does nothing."""
    plain = set(vars(Fault))
    for name, kind in FAULTS.items():
        assert any(getattr(kind, point) is not getattr(Fault, point) for point in plain if point[0] != "_"), name

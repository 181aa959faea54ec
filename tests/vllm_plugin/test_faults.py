"""Where a fault strikes, and what it does to a partial."""

import pytest
import torch

from helix_runtime.vllm_plugin.faults import NO_FAULT, Site, make_fault
from helix_runtime.vllm_plugin.refusal import HelixRefusal


def site(**changes) -> Site:
    usual = {"layer": 0, "kvp_rank": 1, "requests": 1, "decode": True, "reads_context": False, "first_head": 0}
    return Site(**{**usual, **changes})


@pytest.mark.parametrize(
    ("spec", "strikes", "spares"),
    [
        ("drop-shard", {}, None),
        ("drop-shard:layer=1", {"layer": 1}, {"layer": 0}),
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


def test_stale_lse_is_that_of_the_call_before():
    fault = make_fault("stale-lse").at(site())
    output = torch.randn(2, 4, 3)
    first, second, other = torch.randn(2, 4), torch.randn(2, 4), torch.randn(5, 4)
    assert torch.equal(fault.partial(output, first, site())[1], first)
    assert torch.equal(fault.partial(output, second, site())[1], first)
    assert torch.equal(fault.partial(output, other, site())[1], other)  # another shape: nothing stale fits


@pytest.mark.parametrize("spec", ["typo", "drop-shard:never", "drop-shard:layer=x", "lse-base-2:head=1"])
def test_unknown_words_list_the_known(spec):
    with pytest.raises(HelixRefusal, match=r"there are: drop-shard|allowed: batch"):
        make_fault(spec)

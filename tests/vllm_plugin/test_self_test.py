"""The self-test's arithmetic, and that it refuses every exchange defect when one is armed before it."""

import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from harness.observe import SELF_TEST
from harness.server.log import Cause, explain
from helix_runtime.combine.merge import merge_partials
from helix_runtime.vllm_plugin.faults import FAULTS, Site, make_fault
from helix_runtime.vllm_plugin.refusal import HelixRefusal
from helix_runtime.vllm_plugin.self_test import deadline, expected, self_test, tagged_partial

KVP = 2


def site(kvp_rank: int) -> Site:
    return Site(layer=0, kvp_rank=kvp_rank, requests=1, decode=True, reads_context=False, first_head=0)


@dataclass
class OneProcess:
    """Stands for one rank's context: merges the tagged partials of all ranks in this process."""

    kvp_rank: int
    defect: str | None = None
    kvp: int = KVP
    rank: int = 0
    comm: str = "a2a"

    def combine(self, output, lse):
        fault = make_fault(self.defect).fault
        parts = [fault.partial(*(t.float() for t in tagged_partial(rank, KVP)), site(rank)) for rank in range(KVP)]
        merged, _ = merge_partials(
            torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), fault.lse_base
        )
        owner = 1 - self.kvp_rank if self.defect == "swap-chunks" else self.kvp_rank
        each = merged.shape[1] // KVP
        return merged[:, owner * each : (owner + 1) * each]


def test_expected_values_by_hand():
    # Head 0, token 0: outputs 0 + column and 1000 + column, LSEs 0 and 0.5.
    share = math.exp(0.5) / (1 + math.exp(0.5))
    assert expected(0, KVP)[0, 0, 3].item() == pytest.approx(share * 1003 + (1 - share) * 3)
    # Token 1 is empty on rank 1: rank 0's output alone, 100 * token + 10 * head + column.
    assert expected(1, KVP)[1, 0, 5].item() == pytest.approx(100 + 10 * 2 + 5)
    # Token 2 is empty everywhere: exactly 0.
    assert expected(0, KVP)[2].abs().max().item() == 0


@pytest.mark.parametrize("kvp_rank", range(KVP))
def test_a_right_exchange_passes(kvp_rank):
    self_test(OneProcess(kvp_rank), torch.device("cpu"))


@pytest.mark.parametrize("defect", ["swap-chunks", "lse-base-2", "drop-shard"])
def test_a_wrong_exchange_is_refused(defect):
    with pytest.raises(HelixRefusal, match="refusing to serve wrong answers"):
        self_test(OneProcess(0, defect), torch.device("cpu"))


def test_an_unknown_fault_names_the_known_ones():
    with pytest.raises(HelixRefusal) as refusal:
        make_fault("typo")
    for name in FAULTS:
        assert name in str(refusal.value)


def test_an_exchange_that_never_ends_is_a_refusal_in_the_log(capfd):
    """What hangs is ended from another thread, with the words that the harness takes for a failed self-test."""
    ended, statuses = threading.Event(), []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    context = SimpleNamespace(comm="a2a", rank=3, kvp_rank=1, kvp=2)
    with deadline(context, 0.01, end):
        assert ended.wait(30)
    said = capfd.readouterr().err
    assert statuses == [1] and "HelixRefusal: self-test of the a2a exchange on rank 3 (KVP rank 1 of 2)" in said
    found = explain(said, 1)
    assert found.cause is Cause.REFUSED and SELF_TEST in found.reason


def test_an_exchange_that_ends_is_left_alone():
    statuses: list[int] = []
    with deadline(SimpleNamespace(comm="a2a", rank=0, kvp_rank=0, kvp=2), 3600, statuses.append):
        before = threading.active_count()
    assert statuses == [] and before > 1

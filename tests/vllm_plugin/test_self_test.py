"""The self-test's arithmetic, and that it refuses every exchange defect when one is armed before it."""

import math
from dataclasses import dataclass

import pytest
import torch

from helix_runtime.combine.merge import merge_partials
from helix_runtime.vllm_plugin.faults import FAULTS, Site, make_fault
from helix_runtime.vllm_plugin.refusal import HelixRefusal
from helix_runtime.vllm_plugin.self_test import expected, self_test, tagged_partial

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

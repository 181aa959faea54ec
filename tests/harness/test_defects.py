"""Deliberate defects in every path of real servers: each must be found, and localised where it was put.

Slow: about 20 servers. `./test_helix.sh --nightly -k test_defects` runs them.
"""

import pytest

from harness.cell import Cell, Mode
from harness.matrix import PlannedCell, baseline_of
from harness.runner import run
from harness.verdict import Verdict

pytestmark = [pytest.mark.server, pytest.mark.nightly, pytest.mark.timeout(1800)]

SERVE = (
    ("dtype", "float32"), ("max-model-len", 2048), ("enforce-eager", True), ("max-num-seqs", 16),
    ("kv-cache-memory-bytes", 2**26), ("seed", 0),
)  # fmt: skip
GQA = Cell(
    mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=2, kvp=2, interleave=16,
    comm="a2a", serve=(*SERVE, ("block-size", 32)), helix=(("allow_gqa_tpa1", True),), workload="smoke",
)  # fmt: skip
CHUNKED = GQA.model_copy(update={"serve": (*GQA.serve, ("max-num-batched-tokens", 128))})
MLA = Cell(
    mode=Mode.HELIX_MLA, backend="HELIX_CPU_MLA", hardware="cpu", model="recipe:deepseek-v2", tp=2, kvp=2,
    interleave=16, comm="a2a", serve=(*SERVE, ("block-size", 16)), workload="smoke",
)  # fmt: skip


def plan_of(right: Cell, faults: tuple[str, ...]) -> list[PlannedCell]:
    base = baseline_of(right)

    def planned(cell: Cell, compared: Cell | None) -> PlannedCell:
        return PlannedCell(cell=cell, suites=("defects",), declared=Verdict.PASS, declared_why="", baseline=compared)

    return [
        planned(base, None),
        planned(right, base),
        *(planned(right.model_copy(update={"fault": fault}), base) for fault in faults),
    ]


@pytest.mark.parametrize(
    ("right", "faults"),
    [
        pytest.param(
            MLA,
            ("swap-chunks", "lse-base-2", "drop-shard", "local-length-off-by-one", "stale-lse"),
            id="mla",
        ),
        pytest.param(CHUNKED, ("lse-base-2:prefix", "drop-shard:prefix"), id="prefix-hit-and-second-chunk"),
        pytest.param(GQA, ("stale-lse:batch", "local-length-off-by-one:batch", "swap-chunks:batch"), id="batch-only"),
    ],
)
def test_defects_of_one_path_are_found(tmp_path, right, faults):
    found = run(plan_of(right, faults), run_dir=tmp_path, progress=lambda line: None, localise=False)
    assert {result.cell.fault: result.verdict for result in found[1:]} == {
        None: Verdict.PASS,
        **dict.fromkeys(faults, Verdict.FAIL),
    }


def test_a_defect_is_traced_to_its_layer_and_head(tmp_path):
    placed = {
        "drop-shard:layer=1": "in layer 1,",
        "stale-lse:layer=2": "in layer 2,",
        "drop-shard:head=5": "in layer 0, query head 5,",
    }
    found = run(plan_of(GQA, tuple(placed)), run_dir=tmp_path, progress=lambda line: None)
    for result in found[2:]:
        assert result.verdict is Verdict.FAIL
        assert placed[result.cell.fault] in result.localisation, result.localisation

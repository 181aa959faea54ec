"""Deliberate defects in every path of real servers: each must be found, and localised where it was put.

Slow: about 40 servers. `./test_helix.sh --nightly -k test_defects` runs them.
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
CHUNKED = GQA.model_copy(
    update={"serve": (*GQA.serve, ("max-num-batched-tokens", 128), ("no-enable-prefix-caching", True))}
)
MLA = Cell(
    mode=Mode.HELIX_MLA, backend="HELIX_CPU_MLA", hardware="cpu", model="recipe:deepseek-v2", tp=2, kvp=2,
    interleave=16, comm="a2a", serve=(*SERVE, ("block-size", 16)), workload="smoke",
)  # fmt: skip


MLA_CHUNKED = MLA.model_copy(update={"serve": (*MLA.serve, ("max-num-batched-tokens", 128))})
DEFECTS = ("swap-chunks", "lse-base-2", "drop-shard", "local-length-off-by-one", "stale-lse")


def plan_of(right: Cell, faults: tuple[str, ...]) -> list[PlannedCell]:
    base = baseline_of(right)

    def planned(cell: Cell, compared: Cell | None) -> PlannedCell:
        return PlannedCell(cell=cell, suites=("defects",), declared=Verdict.PASS, declared_why="", baseline=compared)

    return [
        planned(base, None),
        planned(right, base),
        *(planned(right.model_copy(update={"fault": fault}), base) for fault in faults),
    ]


def at(where: str) -> tuple[str, ...]:
    return tuple(f"{defect}:{where}" for defect in DEFECTS)


@pytest.mark.parametrize(
    ("right", "faults"),
    [
        pytest.param(MLA, DEFECTS, id="mla"),
        # An MLA prefill merges nothing between ranks: of the five, only a wrong length can strike there.
        pytest.param(MLA_CHUNKED, ("local-length-off-by-one:prefix",), id="mla-context"),
        pytest.param(GQA, (*at("prefix"), *at("batch")), id="prefix-hit-and-batch-only"),
        pytest.param(CHUNKED, at("prefix"), id="second-chunk"),
    ],
)
def test_defects_of_one_path_are_found(tmp_path, right, faults):
    found = run(plan_of(right, faults), run_dir=tmp_path, progress=print, localise=False)
    assert {result.cell.fault: result.verdict for result in found[1:]} == {
        None: Verdict.PASS,
        **dict.fromkeys(faults, Verdict.FAIL),
    }


@pytest.mark.parametrize(
    ("right", "placed"),
    [
        # (layer, query head, rank that owns it): with TP 2, rank 0 owns heads 0 to 3 of 8, rank 1 the others.
        pytest.param(GQA, ((1, 5, 1), (2, 2, 0)), id="gqa"),
        pytest.param(MLA, ((2, 6, 1),), id="mla"),
    ],
)
def test_a_defect_is_traced_to_its_layer_and_head(tmp_path, right, placed):
    faults = tuple(f"drop-shard:layer={layer},head={head}" for layer, head, _ in placed)
    reference, _, *wrong = plan_of(right, faults)
    found = run([reference, *wrong], run_dir=tmp_path, progress=print)[1:]
    for result, (layer, head, rank) in zip(found, placed, strict=True):
        assert result.verdict is Verdict.FAIL
        assert f"in layer {layer}, query head {head}, on rank {rank} " in result.localisation, result.localisation

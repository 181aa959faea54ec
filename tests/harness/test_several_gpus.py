"""What is prepared for hosts with GPUs: suites for several, and the scripts whose selections must name their cells."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from harness.cell import CUDA_GRAPHS, Mode
from harness.cli import make_parser
from harness.hardware import Hardware
from harness.matrix import expand, select
from harness.suite import ROOT, load_all
from harness.verdict import Verdict

NAMES = ["several-gpus", "several-gpus-perf"]
SEVERAL, ONE = (ROOT / "benchmarks" / f"{name}.sh" for name in ("several_gpus", "one_gpu"))
HOPPER = Hardware(family="hopper", name="NVIDIA H200", count=1, memory_bytes=141 * 10**9)


@pytest.fixture(scope="module")
def plan():
    return expand(load_all(["several-gpus"]), [])


def test_they_run_by_their_name_only():
    assert not set(NAMES) & {suite.name for suite in load_all()}


def test_two_gpus_hold_every_mode_of_cuda_graphs_for_gqa_and_mla(plan):
    found = {
        (item.cell.mode, dict(item.cell.serve).get(CUDA_GRAPHS))
        for item in plan
        if item.cell.tp == 2 and not item.cell.baseline
    }
    assert {(Mode.HELIX_GQA, mode) for mode in (None, "PIECEWISE", "FULL_AND_PIECEWISE", "FULL")} <= found
    assert {(Mode.HELIX_MLA, mode) for mode in (None, "PIECEWISE", "FULL_AND_PIECEWISE")} <= found
    assert {(Mode.STANDARD_DCP, mode) for mode in (None, "PIECEWISE", "FULL_AND_PIECEWISE")} <= found


def test_no_cell_is_declared_refused(plan):
    assert not [item.cell.id for item in plan if item.declared is Verdict.REJECTED]
    assert {item.cell.kvp for item in plan if item.cell.mode.helix} == {2, 4, 8}


def test_a_baseline_has_the_graphs_of_what_is_compared_with_it(plan):
    graphs = [item for item in plan if item.baseline and CUDA_GRAPHS in dict(item.cell.serve)]
    assert graphs and all(
        dict(item.baseline.serve)[CUDA_GRAPHS] == dict(item.cell.serve)[CUDA_GRAPHS] for item in graphs
    )


def test_with_one_shared_gpu_cells_about_graphs_are_skipped_and_the_others_run():
    for item in expand(load_all(["several-gpus"]), [HOPPER], share_gpu=True):
        if item.cell.tp > 1:
            assert bool(item.skip) is (CUDA_GRAPHS in dict(item.cell.serve)), item.cell.id


STUB = """#!/bin/bash
[ "$1" = -c ] && { echo "$GPUS h200"; exit; }
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
case "$*" in *harness*--run-dir*perf-512k*) mkdir -p "$OUT/run-perf-512k-$GPUS"
  touch "$OUT/run-perf-512k-$GPUS/ledger.ndjson"; exit 124;; esac
"""


def calls(tmp_path: Path, gpus: int, *parts: str, script: Path = SEVERAL) -> list[list[str]]:
    """What the script would run with Python on a host with so many GPUs."""
    tool, log, out = tmp_path / "bin" / "python3", tmp_path / "calls", tmp_path / "out"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(STUB)
    tool.chmod(0o755)
    log.write_text("")
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "GPUS": str(gpus)}
    environment |= {"CALLS": str(log), "OUT": str(out)}
    done = subprocess.run(["bash", script, out, *parts], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_selection_of_the_script_names_cells_that_the_host_holds(tmp_path, gpus):
    found = calls(tmp_path, gpus)
    assert [call[3] for call in found if call[:2] == ["-m", "benchmarks.exchange"]] == [
        str(ranks) for ranks in (8, 4, 2) if ranks <= gpus
    ]
    runs = [make_parser().parse_args(call[3:]) for call in found if call[:3] == ["-m", "harness", "run"]]
    assert len(runs) == (5 if gpus == 2 else 6)
    for run in runs:
        chosen = select(expand(load_all(run.suite), []), run.cell)  # raises where a glob matches nothing
        assert any(item.cell.tp <= gpus and not item.cell.baseline for item in chosen)


def test_what_was_cut_goes_on_and_what_has_ended_is_passed_over(tmp_path):
    calls(tmp_path, 4, "cells", "perf")
    again = calls(tmp_path, 4, "cells", "perf")
    assert [call[3:] for call in again] == [["--jobs", "1", "--resume", f"{tmp_path}/out/run-perf-512k-4"]]


def test_one_gpu_is_told_to_be_too_few(tmp_path):
    assert calls(tmp_path, 1) == []


def test_the_script_for_one_gpu_selects_every_cell_of_the_recipes_that_a_shared_gpu_runs(tmp_path):
    found = calls(tmp_path, 1, script=ONE)
    runs = [make_parser().parse_args(call[3:]) for call in found if call[:3] == ["-m", "harness", "run"]]
    assert [call[1] for call in found if call[1] != "harness"] == ["pytest", "benchmarks.proof_cost"]
    assert all(run.share_gpu and run.hardware == ["hopper"] for run in runs) and runs[-1].jobs == 1
    chosen = [select(expand(load_all(run.suite), [HOPPER], share_gpu=True), run.cell) for run in runs]
    ours = {item.cell.id for part in chosen for item in part if not item.cell.baseline}
    assert not [item.cell.id for part in chosen for item in part if item.skip]
    names = ["helix-gqa", "helix-mla", "standard-dcp", "kernels", "faults", "known-limitations"]
    wanted = {
        item.cell.id
        for item in expand(load_all(names), [HOPPER], share_gpu=True)
        if item.cell.hardware == "hopper" and item.cell.model.startswith("recipe:") and not item.cell.baseline
    }
    assert wanted == ours and len(wanted) > 40


def test_the_script_for_one_gpu_goes_on_and_passes_over(tmp_path):
    assert len(calls(tmp_path, 1, "proof", "flashmla", script=ONE)) == 2
    assert calls(tmp_path, 1, "proof", "flashmla", script=ONE) == []

"""Real vLLM servers through the scheduler: Ctrl-C and deliberate defects. Slow; one at a time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.cell import Cell, Mode
from harness.matrix import PlannedCell, baseline_of
from harness.runner import run
from harness.server.guard import shared_memory
from harness.verdict import Verdict

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

SERVE = (
    ("dtype", "float32"), ("max-model-len", 2048), ("block-size", 32), ("enforce-eager", True), ("max-num-seqs", 16),
    ("kv-cache-memory-bytes", 2**26), ("seed", 0),
)  # fmt: skip
#: A handful; the suite `faults` has all of them.
FAULTS = ("swap-chunks", "lse-base-2", "drop-shard", "local-length-off-by-one", "stale-lse", "lost-write")


def helix(fault: str | None = None) -> Cell:
    """TP2, KVP 2, TPA 1 of a model with four KV heads: the smallest real exchange."""
    return Cell(
        mode=Mode.HELIX_GQA,
        backend="HELIX_CPU",
        hardware="cpu",
        model="recipe:llama-k4",
        tp=2,
        kvp=2,
        interleave=16,
        comm="a2a",
        serve=SERVE,
        helix=(("allow_gqa_tpa1", True),),
        workload="smoke",
        fault=fault,
    )


def planned(cell: Cell) -> PlannedCell:
    base = None if cell.baseline else baseline_of(cell)
    return PlannedCell(cell=cell, suites=("test",), declared=Verdict.PASS, declared_why="", baseline=base)


def test_every_deliberate_defect_fails_and_the_right_cell_passes(tmp_path):
    """`other-combine` answers rightly, by a combine that the cell does not claim: only the proof of path can tell."""
    faults = (*FAULTS, "other-combine")
    plan = [planned(baseline_of(helix())), planned(helix()), *(planned(helix(fault)) for fault in faults)]
    found = run(plan, run_dir=tmp_path, progress=lambda line: None, localise=False)
    assert {result.cell.fault: result.verdict for result in found[1:]} == {
        None: Verdict.PASS,
        **dict.fromkeys(FAULTS, Verdict.FAIL),
        "other-combine": Verdict.UNPROVEN,
    }


SCRIPT = """
import sys
from pathlib import Path
import test_real_servers as t
t.run([t.planned(t.baseline_of(t.helix()))], run_dir=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_nothing_outlives_an_interrupted_run(tmp_path, how):
    """Two workers of a real server are up and share memory when the run is ended from outside."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    harness = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, stdout=subprocess.DEVNULL)
    try:
        tree, shared = _with_shared_memory(harness.pid)
        harness.send_signal(how)
        harness.wait(60)
    finally:
        harness.kill()
    assert harness.returncode in (-how, 130)
    until = time.monotonic() + 30
    while time.monotonic() < until and (_living(tree) or _left(shared)):
        time.sleep(0.1)
    assert _living(tree) == []
    assert _left(shared) == []


def _with_shared_memory(pid: int, seconds: float = 120) -> tuple[list[psutil.Process], set[str]]:
    """The processes below `pid` and their shared memory, once the two ranks share some."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tree = psutil.Process(pid).children(recursive=True)
        shared = set().union(*(shared_memory(process.pid) for process in tree))
        if sum("cpushm" in name for name in shared) >= 2:
            return tree, shared
        time.sleep(0.2)
    raise AssertionError("the ranks of the server never shared memory")


def _living(tree: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _left(shared: set[str]) -> list[str]:
    return [name for name in shared if Path(name).exists()]

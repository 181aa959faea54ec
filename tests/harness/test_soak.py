"""200 starts of a small server with random deaths, under a harness that is itself killed: nothing stays behind."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import TINY
from stub_host import cell
from test_containers import ours
from test_faults_real import HOST, nothing_held, stubs

from harness import ledger
from harness.verdict import Verdict

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]
CELLS = 160  # some of them start twice
KILLS = 6  # of the harness
#: Behaviours and whether their cell passes.
BEHAVIOURS = {
    "well": True, "slow": True, "stubborn": True, "killed": False, "killed-answering": False, "dies-answering": False,
    "leaks-and-dies": False, "out-of-memory": False, "refused": None, "truncates": False, "http-500": False,
}  # fmt: skip


def test_nothing_is_left_of_two_hundred_starts(tmp_path, monkeypatch):
    soak(tmp_path, monkeypatch)
    logs = [path.read_text() for path in (tmp_path / "run").rglob("server.log")]
    shared = [name for text in logs for name in re.findall(r"shm (\S+)", text)]
    assert shared and not [name for name in shared if (Path("/dev/shm") / name).exists()]


@pytest.mark.server
def test_nothing_is_left_of_two_hundred_starts_in_containers(docker, tmp_path, monkeypatch):
    soak(tmp_path, monkeypatch, "--docker", TINY)
    assert ours(docker.client) == []


def soak(tmp_path, monkeypatch, *options: str) -> None:
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    chance = random.Random(7)
    behaviours = [chance.choice(list(BEHAVIOURS)) for _ in range(CELLS)]
    run_dir, kills = tmp_path / "run", 0
    path = f"{HOST.parent}:{HOST.parents[2]}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    while True:
        again = ["--resume"] if kills else []
        command = [sys.executable, str(HOST), str(run_dir), "--jobs", "4", *options, *again, *behaviours]
        harness = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        try:
            harness.wait(chance.uniform(8, 20) if kills < KILLS else 2500)
            break
        except subprocess.TimeoutExpired:
            harness.send_signal(signal.SIGKILL)
            harness.wait()
            kills += 1
    assert harness.returncode == 0

    events, warnings = ledger.read(run_dir / ledger.NAME)
    assert [told for told in warnings if "torn" not in told] == []
    rows = {result.cell.id: result for result in ledger.results(events)}
    assert len(rows) == CELLS
    for number, behaviour in enumerate(behaviours, 1):
        row = rows[cell(number).id]
        passes = BEHAVIOURS[behaviour]
        wanted = Verdict.REJECTED if passes is None else Verdict.PASS if passes else Verdict.ERROR
        assert (row.verdict, bool(row.reason)) == (wanted, True), (behaviour, row.reason)
    explained = [event for event in events if event["event"] == "attempt"]
    assert all(event["verdict"] in ("pass", "rejected") or event["reason"] for event in explained)
    starts = [event for event in events if event["event"] == "cell-start"]
    again = sum(event["number"] > 1 for event in explained)
    assert len(starts) + again >= 200

    until = time.monotonic() + 30
    while time.monotonic() < until and stubs(tmp_path):
        time.sleep(0.2)
    assert stubs(tmp_path) == []
    assert nothing_held()
    assert [path.name for path in scratch.glob("hx-*")] == []
    told = f"{len(starts)} starts of cells and {again} second attempts, {len(explained)} attempts judged"
    print(f"{told}, {kills} kills of the harness, {len(rows)} rows")

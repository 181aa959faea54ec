"""Suites as tests: cells are collected by id, run after their baselines, and a verdict that differs fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.suite import ROOT

CONFTEST = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pytest
from harness import pytest_suites
from harness.pytest_suites import pytest_collect_file
from harness.runner import run
from harness.server.log import Cause
from test_resume import Saving
from test_runner import failed, transcript, good
from harness import runner

pytest_suites.RUNS = Path({runs!r})
runner.code_key = lambda: "same"
RAN = Path({runs!r}) / "ran.txt"

class Executor(Saving):
    def attempt(self, cell, folder, follow, ask=True):
        with RAN.open("a") as file:
            file.write(f"{{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}} {{cell.id}}\\n")
        if not ask:
            return failed(cell, Cause.REFUSED, "documented limit of the original design")
        shift = 0.5 if cell.interleave == 16 else 0.0
        self.answers = {{cell.key: good(cell, transcript=transcript(cell, shift=shift), proofs=())}}
        return super().attempt(cell, folder, follow, ask)

pytest_suites.run = lambda plan, **options: run(plan, executor=Executor(), localise=False, **options)
"""


@pytest.fixture
def suites(tmp_path):
    """A folder with the suite `smoke`, whose Helix cell answers otherwise than its baseline."""
    (tmp_path / "runs").mkdir()
    text = CONFTEST.format(tests=str(Path(__file__).parent), runs=str(tmp_path / "runs"))
    (tmp_path / "conftest.py").write_text(text)
    (tmp_path / "smoke.yaml").write_text((ROOT / "suites" / "smoke.yaml").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def call(folder: Path, *arguments: str) -> tuple[int, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short", *arguments, "."]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_cells_are_tests(suites):
    status, said = call(suites, "-n", "0")
    assert status == 1, said
    assert "1 failed, 3 passed" in said, said
    assert "FAILED smoke.yaml::cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/a2a/i16/workload=smoke" in said
    assert "fail: " in said and "declared pass" in said
    ran = [line.split()[1] for line in (suites / "runs" / "ran.txt").read_text().splitlines()]
    assert len(ran) == len(set(ran)) == 4  # baselines are run once


def test_one_cell_brings_its_baselines(suites):
    status, said = call(suites, "-n", "0", "-k", "standard-tp and tp4")
    assert status == 0, said
    ran = [line.split()[1] for line in (suites / "runs" / "ran.txt").read_text().splitlines()]
    assert [name.split("/")[4] for name in ran] == ["tp1", "tp4"]


def test_workers_have_folders_of_their_own(suites):
    status, said = call(suites, "-n", "2")
    assert status == 1 and "1 failed" in said, said
    folders = {path.name[-3:] for path in (suites / "runs").iterdir() if path.is_dir()}
    assert folders == {"gw0", "gw1"}

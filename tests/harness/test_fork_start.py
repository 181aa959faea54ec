"""A program started by fork_start forks its workers whatever it asks for, and notices nothing else."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
from test_server import cell

from harness.cell import Mode, python
from harness.server import fork_start
from harness.server.launch import make_launch
from harness.suite import ROOT

KEPT = "VLLM_WORKER_MULTIPROC_METHOD"
TINY = f"""
import json, os, subprocess, sys

ways = {{"at start": os.environ.get("{KEPT}")}}
os.environ["{KEPT}"] = "spawn"
ways["assigned"] = os.environ["{KEPT}"]
os.environ.update({{"{KEPT}": "spawn", "UPDATED": "new"}})
ways["updated"] = os.environ["{KEPT}"]
os.environ.setdefault("{KEPT}", "spawn")
ways["defaulted"] = os.getenv("{KEPT}")
os.environ["OTHER"] = "changed"
del os.environ["GONE"]
code = "import json, os; print(json.dumps(dict(os.environ)))"
child = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
print(json.dumps({{"ways": ways, "argv": sys.argv, "name": __name__, "own": dict(os.environ), "child": child}}))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a tiny module saw of itself, run through fork_start with arguments, and its exit status."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "tiny_program.py").write_text(TINY)
    env = {**os.environ, "PYTHONPATH": str(folder), KEPT: "spawn", "OTHER": "before", "KEEP": "same", "GONE": "1"}
    command = [sys.executable, "-m", "harness.server.fork_start", "tiny_program", "--port", "1", "-m", "a b", "--"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert done.returncode == 7, done.stderr
    return {**json.loads(done.stdout), "file": str(folder / "tiny_program.py")}


def test_the_method_stays_fork_whatever_is_assigned(said):
    assert said["ways"] == {"at start": "fork", "assigned": "fork", "updated": "fork", "defaulted": "fork"}
    assert said["own"][KEPT] == "fork"


def test_children_see_it_too(said):
    assert said["child"][KEPT] == "fork"


@pytest.mark.parametrize("where", ["own", "child"])
def test_other_variables_are_as_the_program_leaves_them(said, where):
    assert (said[where]["OTHER"], said[where]["UPDATED"], said[where]["KEEP"]) == ("changed", "new", "same")
    assert "GONE" not in said[where]


def test_the_program_is_main_and_has_its_arguments(said):
    assert said["name"] == "__main__"
    assert said["argv"] == [said["file"], "--port", "1", "-m", "a b", "--"]


def test_multiprocessing_forks_what_asks_for_the_variable(tmp_path):
    """A forked worker shares the memory of its parent: it sees what was set after the start."""
    (tmp_path / "tiny_workers.py").write_text(
        "import multiprocessing, os\n"
        "LOADED = ['at import']\n"
        "def work():\n"
        "    print(LOADED, flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    os.environ['{KEPT}'] = 'spawn'\n"
        "    LOADED.append('later')\n"
        f"    worker = multiprocessing.get_context(os.environ['{KEPT}']).Process(target=work)\n"
        "    worker.start(); worker.join(30)\n"
    )
    command = [sys.executable, "-m", "harness.server.fork_start", "tiny_workers"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert done.stdout == "['at import', 'later']\n", done.stderr


def test_what_waits_leaves_its_core_to_others(tmp_path):
    """Yielding a hundred times over takes next to none of the processor's time while it lasts."""
    (tmp_path / "tiny_wait.py").write_text(
        "import os, time\n"
        "began, used = time.perf_counter(), time.process_time()\n"
        "for _ in range(100):\n"
        "    os.sched_yield()\n"
        "print(time.process_time() - used, time.perf_counter() - began)\n"
    )
    command = [sys.executable, "-m", "harness.server.fork_start", "tiny_wait"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    used, lasted = map(float, done.stdout.split())
    assert used < lasted / 2, done.stderr


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))


def test_cpu_cells_are_started_by_it(tmp_path):
    start = (python(), "-m", "harness.server.fork_start")
    baseline = make_launch(cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", kvp=1), tmp_path, 21000)
    assert baseline.argv[:5] == (*start, "vllm.entrypoints.openai.api_server", "--model")
    helix = make_launch(cell(), tmp_path, 21000)
    assert helix.argv[:4] == (*start, "helix_runtime.serve")
    assert helix.argv[4:6] == ("serve", helix.model)


def test_gpu_cells_are_not_unless_asked(tmp_path, monkeypatch):
    gpu = {"hardware": "hopper", "backend": "FLASH_ATTN", "model": "org/model"}
    assert make_launch(cell(**gpu), tmp_path, 21000).argv[:3] == ("vllm", "serve", "org/model")
    monkeypatch.setenv("HELIX_WARM", "all")
    warm = make_launch(cell(**gpu), tmp_path, 21000)
    assert warm.forked[:3] == ("vllm.entrypoints.cli.main", "serve", "org/model")


def test_a_server_on_gpus_may_go_back_to_spawn(monkeypatch):
    """vLLM does where CUDA is initialised before its workers are."""
    monkeypatch.setenv(KEPT, "fork")
    monkeypatch.setattr(os.environ, "__class__", type(os.environ))
    ran, yields = [], os.sched_yield
    monkeypatch.setattr(fork_start.runpy, "run_module", lambda name, **_: ran.append(name))
    monkeypatch.setattr(sys, "argv", sys.argv)
    fork_start.run([fork_start.CUDA_MAIN, "serve", "m"])
    os.environ[KEPT] = "spawn"
    assert ran == [fork_start.CUDA_MAIN] and os.environ[KEPT] == "spawn"
    assert os.sched_yield is yields


def test_an_eager_gpu_server_is_told_of_no_fusion_whose_size_would_initialise_cuda_in_its_parent(tmp_path):
    gpu = {"hardware": "hopper", "backend": "FLASH_ATTN", "model": "org/model"}

    def told(**serve) -> list[str]:
        argv = make_launch(cell(**gpu, serve=tuple(serve.items())), tmp_path, 21000).argv
        return [after for word, after in pairwise(argv) if word.startswith("--compilation-config")]

    (config,) = told(**{"enforce-eager": True})
    from vllm.config import PassConfig

    asked = PassConfig(**json.loads(config)["pass_config"])
    assert asked.fuse_allreduce_rms is False
    assert told() == [] and told(**{"enforce-eager": True, "compilation-config": "{}"}) == ["{}"]
    assert not any("compilation" in word for word in make_launch(cell(), tmp_path, 21000).argv)  # CPU

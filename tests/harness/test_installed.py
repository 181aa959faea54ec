"""The distribution as an image has it: installed, with no checkout around. What is built here has no dependencies."""

import os
import subprocess
import sys

import pytest

from harness.images import make_wheel
from harness.resume import code_key
from harness.suite import available


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed distribution."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = make_wheel(folder)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder / "site"]
    subprocess.run([*command, wheel], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def called(installed, tmp_path):
    def call(*words):
        environment = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "harness", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    return call


def test_it_has_the_suites_and_the_very_code_of_the_checkout(installed):
    there = {path.name: path.read_text() for path in (installed / "harness" / "suites").iterdir()}
    assert there == {path.name: path.read_text() for path in available().values()}
    assert code_key(installed) == code_key()  # else `merge` would call it other code


def test_it_lists_its_suites_and_prints_their_commands_from_anywhere(called):
    status, told = called("--suite", "smoke", "--list")
    assert status == 0 and "smoke" in told
    assert called("--all", "--hardware", "hopper", "--list")[0] == 0
    status, told = called("--suite", "smoke", "--hardware", "cpu", "--dry-run")
    assert status == 0 and "--tensor-parallel-size" in told


@pytest.mark.parametrize("where", [("--run-dir", "run"), ()])
def test_it_runs_and_reports_where_it_is_called(called, installed, tmp_path, where):
    suite = tmp_path / "none-here.yaml"  # a cell of other hardware: skipped, and no server is started
    suite.write_text(
        "schema: 1\nname: none-here\ndescription: d\ngroups:\n  - {name: g, mode: standard-tp, backend: auto, "
        "hardware: hopper, model: 'recipe:llama-k4', layout: {tp: 1}}\n"
    )
    status, told = called("--suite", suite, *where)
    assert status == 0, told
    folder = tmp_path / "run" if where else next((tmp_path / "reports" / "runs").iterdir())
    assert (folder / "index.html").is_file() and not (installed / "reports").exists()


def test_a_rendering_of_it_takes_its_code_from_the_image(called, installed, tmp_path):
    words = ("render", "slurm", "--suite", "helix-gqa", "--hardware", "hopper", "--into")
    status, told = called(*words, tmp_path / "a")
    assert status == 2 and "--image is needed" in told
    assert called(*words, tmp_path / "b", "--image", "docker://reg/helix:1")[0] == 0
    assert str(installed) not in (tmp_path / "b" / "hopper-8gpu.sbatch").read_text()


def test_what_needs_a_checkout_says_so(called):
    status, told = called("--unit")
    assert status == 2 and "the tests are in a checkout" in told

"""`test_helix.sh`: what it refuses, and what a failed install leaves. The real install is what CI does first."""

import os
import subprocess
import sys

import pytest

from harness.suite import ROOT


def bootstrap(**environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("HELIX_VENV", "HELIX_EXTRA", "PYTHON")}
    return subprocess.run(
        [ROOT / "test_helix.sh", "--list"], capture_output=True, text=True, timeout=120, env=clean | environment
    )


def test_a_python_that_is_none_is_refused(tmp_path):
    done = bootstrap(PYTHON="/bin/false", HELIX_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert "is not a Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_unknown_extra_is_refused(tmp_path):
    done = bootstrap(HELIX_EXTRA="rocm", HELIX_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert "allowed: cpu, cuda" in done.stderr


def test_a_folder_with_other_things_in_it_is_never_cleared(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    done = bootstrap(PYTHON=sys.executable, HELIX_VENV=str(tmp_path), HELIX_EXTRA="cpu")
    assert done.returncode == 2
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.nightly
def test_a_cut_install_says_why_and_leaves_no_stamp(tmp_path):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    venv = tmp_path / "venv"
    for _ in range(2):  # the second call repairs: it tries again in the same environment
        done = bootstrap(PYTHON=sys.executable, HELIX_VENV=str(venv), HELIX_EXTRA="cpu", **offline)
        assert done.returncode == 3
        assert "installing torch==" in done.stderr
        assert str(venv / "install.log") in done.stderr
        assert not (venv / "helix-stamp").exists()
    assert (venv / "helix-base").exists()

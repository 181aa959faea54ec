"""The CI files fit the published schemas of their services, and actionlint finds nothing where it is installed."""

import shutil
import subprocess
import sys

import pytest
import yaml

from harness.suite import ROOT, load_all

FILES = [
    ("vendor.github-workflows", ".github/workflows/ci.yml"),
    ("vendor.github-workflows", ".github/workflows/nightly.yml"),
    ("vendor.buildkite", ".buildkite/pipeline.yml"),
]


@pytest.mark.parametrize(("schema", "file"), FILES)
def test_the_file_fits_its_schema(schema, file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint on PATH; ci.yml runs it")
def test_actionlint_finds_nothing():
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_push_runs_the_tests():
    triggers = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())[True]
    assert "push" in triggers and triggers["push"] is None


def test_every_release_of_the_version_sweep_has_an_image_in_the_nightly():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]
    tags = {tag.removeprefix("v") for tag in jobs["versions"]["strategy"]["matrix"]["tag"]}
    (suite,) = load_all(["version-sweep"])
    assert tags == {version for group in suite.groups for version in group.vllm_version}


def test_no_pull_request_reaches_a_self_hosted_runner():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        own = [name for name, job in workflow["jobs"].items() if "self-hosted" in job["runs-on"]]
        triggers = workflow[True]  # YAML reads `on` as a boolean
        assert not own or not {"pull_request", "pull_request_target"} & set(triggers), path


def test_every_harness_command_in_the_workflows_exists():
    from harness.cli import SUBCOMMANDS

    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        words = path.read_text().split()
        called = {words[at + 2] for at, word in enumerate(words) if word == "-m" and words[at + 1] == "harness"}
        assert {name for name in called if not name.startswith("-")} <= set(SUBCOMMANDS), path

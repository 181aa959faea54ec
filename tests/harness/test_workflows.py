"""The CI files fit the published schemas of their services, and actionlint finds nothing where it is installed."""

import os
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


def nightly() -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]


def run_step(name: str, folder, **environment: str) -> None:
    """What that step of the nightly runs, in `folder`, as the service runs it."""
    (script,) = (step["run"] for job in nightly().values() for step in job["steps"] if step.get("name") == name)
    subprocess.run(["bash", "-e", "-c", script], cwd=folder, env={**os.environ, **environment}, check=True)


def git(folder, *words: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_families_of_own_runners_are_a_variable_and_none_without_it():
    own = {name: job for name, job in nightly().items() if "self-hosted" in job["runs-on"]}
    assert set(own) == {"gpu", "versions"}
    for job in own.values():
        assert job["strategy"]["matrix"]["hardware"] == "${{ fromJSON(vars.HELIX_RUNNERS || '[]') }}"
        assert job["if"] == "vars.HELIX_RUNNERS && vars.HELIX_RUNNERS != '[]'"


def test_what_the_nightly_publishes_comes_from_every_job_that_asks():
    publish = nightly()["publish"]
    assert set(publish["needs"]) == {"cpu", "gpu", "versions", "surface"} and publish["if"] == "always()"
    assert not [step for step in nightly()["surface"]["steps"] if "continue-on-error" in step]


def test_cells_for_several_gpus_run_at_night_and_before_the_upload():
    steps = nightly()["gpu"]["steps"]
    (at,) = (place for place, step in enumerate(steps) if "--suite several-gpus" in step.get("run", ""))
    assert steps[at]["continue-on-error"] and steps[-1]["with"]["path"] == "reports/runs" and at < len(steps) - 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_root_wrote_in_a_container_is_given_back(tmp_path):
    last = nightly()["versions"]["steps"][-1]
    assert last["if"] == "always()"
    outside = tmp_path / "outside"
    outside.touch()
    work = tmp_path / "_work"
    (work / "r" / "r" / "build").mkdir(parents=True)
    (work / "r" / "r" / "build" / "x").touch()
    (work / "r" / "r" / "link").symlink_to(outside)
    os.chown(work, 12345, 12345)
    run_step(last["name"], tmp_path, GITHUB_WORKSPACE=str(work / "r" / "r"))
    assert {path.lstat().st_uid for path in work.rglob("*")} == {12345} and outside.stat().st_uid == 0


def test_the_branch_of_nights_begins_empty_and_goes_on(tmp_path):
    here, origin = tmp_path / "here", tmp_path / "origin"
    git(tmp_path, "init", "--quiet", "--bare", str(origin))
    git(tmp_path, "clone", "--quiet", str(origin), str(here))
    (here / "code").write_text("code")
    git(here, "add", ".")
    git(here, "commit", "--quiet", "--message", "code")
    for night in ("2026-11-01-1", "2026-11-02-2"):
        run_step("Earlier nights", here)
        assert not (here / "nights" / "code").exists()
        (here / "nights" / night).mkdir()
        (here / "nights" / night / "ledger").touch()
        git(here / "nights", "add", ".")
        git(here / "nights", "commit", "--quiet", "--message", night)
        git(here / "nights", "push", "--quiet", "origin", "HEAD:helix-nights")
        git(here, "worktree", "remove", "nights")
        git(here, "branch", "--quiet", "-D", "helix-nights")
    kept = git(origin, "ls-tree", "-r", "--name-only", "helix-nights").split()
    assert kept == ["2026-11-01-1/ledger", "2026-11-02-2/ledger"]
    assert git(origin, "rev-list", "--count", "helix-nights").strip() == "2"


@pytest.mark.parametrize("there", [0, 3, 70])
def test_the_last_60_nights_are_kept_with_the_one_to_come(tmp_path, there):
    names = [f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}-{day}" for day in range(there)]
    for name in names:
        (tmp_path / "nights" / name / "cells").mkdir(parents=True)
    (tmp_path / "nights").mkdir(exist_ok=True)
    (tmp_path / "nights" / "index.html").touch()
    run_step("Leave out the oldest nights", tmp_path)
    assert {path.name for path in (tmp_path / "nights").iterdir()} == {*names[-59:], "index.html"}


@pytest.mark.parametrize("answer", ["vLLM 1: 2 of 2", "", None])
def test_the_summary_says_what_the_surface_said(tmp_path, answer):
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "summary.md").write_text("cells\n")
    if answer is not None:
        (tmp_path / "answers").mkdir()
        (tmp_path / "answers" / "surface.txt").write_text(answer and f"{answer}\n")
    summary = tmp_path / "step.md"
    run_step("What the plugin hooks in vLLM's nightly build", tmp_path, NIGHT="night", GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text() == (tmp_path / "night" / "summary.md").read_text()
    assert (
        summary.read_text().startswith("cells\n")
        and (answer or "no answer: see the job surface") in summary.read_text()
    )
    assert (tmp_path / "night" / "surface.txt").is_file() == bool(answer)


def test_every_push_runs_the_tests():
    triggers = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())[True]
    assert "push" in triggers and triggers["push"] is None


def test_every_release_of_the_version_sweep_has_an_image_in_the_nightly():
    tags = {tag.removeprefix("v") for tag in nightly()["versions"]["strategy"]["matrix"]["tag"]}
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

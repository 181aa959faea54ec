"""The command line, from arguments to exit status and text. The runner is a fake: no server is started."""

import json
import os
import re
import subprocess
import sys

import pytest

from harness import cli, run
from harness.cell import Cell, Mode
from harness.hardware import Hardware
from harness.matrix import PlannedCell
from harness.result import CellResult
from harness.suite import ROOT
from harness.verdict import Verdict

CPU = Hardware(family="cpu", name="test", count=2, memory_bytes=8 * 2**30)
HOPPER = Hardware(family="hopper", name="H", count=8, memory_bytes=80 * 2**30, compute_capability="9.0")
SMOKE_HELIX = "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/a2a/i16/workload=smoke"


@pytest.fixture
def call(capsys):
    def call(*argv, found=(CPU,)):
        status = cli.main(argv, found=lambda: list(found))
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


class FakeRunner:
    """Answers each cell with its declared verdict, or with what `verdicts` has for its id."""

    def __init__(self, verdicts=None, interrupt=False):
        self.verdicts, self.interrupt, self.calls = verdicts or {}, interrupt, []

    def __call__(self, plan, *, run_dir, jobs, runtime, progress, **terms):
        self.calls.append((plan, run_dir, jobs, runtime))
        self.terms = terms
        if self.interrupt:
            raise KeyboardInterrupt
        results = []
        for item in plan:
            progress(f"start {item.cell.id}")
            verdict = Verdict.SKIP if item.skip else self.verdicts.get(item.cell.id, item.declared)
            results.append(
                CellResult(
                    cell=item.cell,
                    suites=item.suites,
                    declared=item.declared,
                    declared_why=item.declared_why,
                    verdict=verdict,
                    reason=item.skip or "because",
                )
            )
        return results


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def fake(**arguments):
        runner = FakeRunner(**arguments)
        monkeypatch.setattr(run, "_runner", lambda: runner)
        monkeypatch.setattr(run, "_reporter", lambda: lambda run_dir: run_dir / "index.html")
        monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
        return runner

    return fake


def test_a_bare_call_prints_help(call):
    status, out, _ = call()
    assert status == 0
    for option in ("--all", "--list", "--suite", "--cell", "--dry-run", "--jobs", "--runtime", "--unit", "--nightly"):
        assert option in out
    assert "examples:" in out


def test_the_help_and_the_error_name_every_command(call):
    _, out, _ = call()
    status, _, err = call("frobnicate")
    assert status == 2 and "no command 'frobnicate'" in err
    for command in ("run", *cli.SUBCOMMANDS):
        assert re.search(rf"^  .*\b{command}\b", out.partition("commands, each")[2], re.M) and f" {command}" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--all", "--suite", "smoke"], "either --all or --suite"),
        (["--list", "--dry-run"], "either --list or --dry-run"),
        (["--all", "--format", "json"], "goes with --list and --dry-run"),
        (["--jobs", "2"], "nothing to do"),
        (["--all", "--jobs", "0"], "allowed: a whole number from 1"),
        (["--all", "--runtime", "podman"], "'auto', 'process', 'docker'"),
        (["--resume", "--all"], "leave out --all"),
        (["--resume", "no-such-run"], "no run with a ledger.ndjson there"),
        (["--suite", "smoek", "--list"], "did you mean 'smoke'? "),
        (["--cell", "nothing/*", "--list"], "matches none"),
        (["--hardware", "volta", "--list"], "allowed: cpu, ampere"),
        (["--all", "--hardware", "hopper"], "--list and --dry-run only"),
        (["--al"], "--al"),
        (["surprise"], "surprise"),
    ],
)
def test_bad_usage_is_2_and_says_what_is_allowed(call, fake, argv, says):
    runner = fake()
    status, _, err = call(*argv)
    assert status == 2
    assert says.strip() in err
    assert "--help" in err or "suite-v1.json" in err
    assert runner.calls == []


def test_a_bad_suite_file_is_2_with_its_line(call, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("schema: 1\nname: bad\ndescription: x\ngruops: []\n")
    status, _, err = call("--suite", str(path), "--dry-run")
    assert status == 2
    assert f"{path}:4: gruops: unknown key 'gruops'; did you mean 'groups'? allowed: schema, name" in err


def test_list_counts_what_runs_here(call):
    status, out, _ = call("--list")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if line[:5] in ("smoke", "helix")}
    assert rows["smoke"] == ["4", "4"]  # the TP1 reference, the baseline, the Helix cell, the refusal
    cells, here = map(int, rows["helix-mla"])
    assert here >= 12  # at least 6 cells, 3 baselines and their 3 references on CPU
    assert cells > here + 20  # and those for GPUs


def test_list_verbose_says_the_declared_verdict_and_why(call):
    _, out, _ = call("--list", "-v", "--suite", "smoke")
    assert f"✓ pass      {SMOKE_HELIX}" in out
    assert "⊟ rejected  cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp4/i1" in out
    assert "documented limit of the original design" in out


def test_list_as_json(call):
    _, out, _ = call("--list", "-v", "--suite", "smoke", "--format", "json")
    document = json.loads(out)
    assert [suite["name"] for suite in document["suites"]] == ["smoke"]
    assert {cell["declared"] for cell in document["cells"]} == {"pass", "rejected"}
    assert document["hardware"][0]["family"] == "cpu"


def test_dry_run_prints_the_published_usage_on_lines_of_its_own(call):
    _, out, _ = call("--all", "--dry-run")
    lines = out.splitlines()
    assert (
        "vllm serve nvidia/Llama-3.1-Nemotron-Nano-8B-v1 --tensor-parallel-size 8 --decode-context-parallel-size 2 "
        "--helix-mode --attention-backend FLASH_ATTN --cp-kv-cache-interleave-size 16"
    ) in lines
    assert (
        "vllm serve deepseek-ai/DeepSeek-V2-Lite-Chat --tensor-parallel-size 8 --decode-context-parallel-size 8 "
        "--helix-mode --cp-kv-cache-interleave-size 64 --trust-remote-code"
    ) in lines


def test_dry_run_as_json_is_the_same_list(call):
    _, text, _ = call("--suite", "smoke", "--dry-run")
    _, out, _ = call("--suite", "smoke", "--dry-run", "--format", "json")
    cells = json.loads(out)
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [cell["shown"] for cell in cells] == commands
    assert [cell["baseline"] for cell in cells] == [
        None,
        "cpu/standard-tp/CPU_ATTN/llama-k4/tp1/no-enable-prefix-caching=True/workload=smoke@4",
        "cpu/standard-tp/CPU_ATTN/llama-k4/tp4/workload=smoke",
        None,
    ]


def test_hardware_may_be_named_for_planning(call):
    _, out, _ = call("--suite", "helix-mla", "--list", "--hardware", "hopper")
    assert "hopper (assumed, not on this host)" in out
    _, out, _ = call("--suite", "smoke", "--list", found=[HOPPER])
    assert "0  The fastest" in " ".join(out.split()).replace(" The", "  The")
    _, out, _ = call("--suite", "smoke", "--list", "--hardware", "cpu", found=[HOPPER])
    assert "4  The fastest" in " ".join(out.split()).replace(" The", "  The")


def test_assumed_hardware_is_counted_by_what_it_would_run(call):
    def counts(*argv, found=(CPU,)):
        _, out, _ = call("--list", "--suite", "helix-gqa", *argv, found=found)
        head, row = (line.split() for line in out.splitlines()[2:4])
        return head[2], int(row[1]), int(row[2]), out.splitlines()[5]

    where, cells, there, last = counts("--hardware", "hopper")
    assert (where, cells, there) == ("hopper", *counts(found=[HOPPER])[1:3])
    assert last.endswith(f"{there} would run on hopper with as many GPUs as they need, 0 can run here.")
    _, _, here, last = counts()
    assert last.endswith(f"(suites share some), {here} can run here.")
    assert counts("--hardware", "hopper,cpu")[:3] == ("hopper,cpu", cells, there + here)

    def as_json(*argv):
        return json.loads(call("--list", "--suite", "helix-gqa", "--format", "json", *argv)[1])["suites"][0]

    assert (as_json("--hardware", "hopper")["here"], as_json("--hardware", "hopper")["assumed"]) == (0, there)
    assert as_json().keys() == {"name", "description", "cells", "here"}


def test_a_run_reports_and_ends_0(call, fake, tmp_path):
    runner = fake()
    status, out, _ = call("--suite", "smoke", "--jobs", "2")
    assert status == 0
    (plan, run_dir, jobs, runtime) = runner.calls[0]
    assert (len(plan), jobs, runtime) == (4, 2, "process")
    assert run_dir.is_dir()
    assert run_dir.parent == tmp_path / "runs"
    assert "runtime: process (auto: no GPU here" in out
    assert f"start {SMOKE_HELIX}" in out
    assert "4 cells: 3 pass, 1 rejected" in out
    assert out.splitlines()[-1] == f"report: {run_dir}/index.html"


def test_two_cells_at_a_time_where_all_run_on_cpu_unless_told(call, fake):
    runner = fake()
    call("--suite", "smoke")
    assert runner.calls[0][2] == 2
    call("--suite", "smoke", "--jobs", "1")
    assert runner.calls[1][2] == 1


def test_one_at_a_time_beside_a_gpu_cell():
    on_cpu = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=1)
    on_gpu = on_cpu.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    known = {"suites": ("s",), "declared": Verdict.PASS, "declared_why": "w"}
    cpu, gpu = (PlannedCell(cell=cell, **known) for cell in (on_cpu, on_gpu))
    assert run.usual_jobs([cpu, cpu]) == 2 and run.usual_jobs([cpu, gpu]) == 1
    assert run.usual_jobs([cpu, gpu.model_copy(update={"skip": "no hopper here"})]) == 2


@pytest.mark.parametrize(
    ("verdict", "status", "tells"),
    [(Verdict.FAIL, 1, True), (Verdict.UNPROVEN, 1, True), (Verdict.ERROR, 3, True), (Verdict.PASS, 0, False)],
)
def test_exit_status_and_reason_of_a_run(call, fake, verdict, status, tells):
    fake(verdicts={SMOKE_HELIX: verdict})
    got, out, _ = call("--suite", "smoke")
    assert got == status
    assert f"{verdict:<8}  {SMOKE_HELIX}" in out
    assert ("    because" in out) is tells


def test_skipped_cells_are_summed_up_by_reason(call, fake):
    fake()
    status, out, _ = call("--suite", "helix-mla")
    assert status == 0
    assert "– skip      " in out
    assert "no blackwell here" in out
    assert out.count("– skip") == 3  # hopper, blackwell, blackwell-rtx


def test_run_dir_must_be_new(call, fake, tmp_path):
    runner = fake()
    assert call("--suite", "smoke", "--run-dir", str(tmp_path / "a" / "b"))[0] == 0
    assert runner.calls[0][1] == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "ledger.ndjson").write_text("{}\n")
    status, _, err = call("--suite", "smoke", "--run-dir", str(tmp_path / "a" / "b"))
    assert status == 2
    assert "name a new folder" in err


def test_a_folder_that_cannot_be_written_is_2(call, fake):
    fake()
    status, _, err = call("--suite", "smoke", "--run-dir", "/proc/nowhere")
    assert status == 2
    assert "cannot write into /proc/nowhere" in err and "--run-dir" in err


def test_a_full_disk_is_3_and_says_what_is_kept(call, monkeypatch, tmp_path):
    import errno

    import harness.run

    def full(plan, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "ledger.ndjson"))

    monkeypatch.setattr(harness.run, "_runner", lambda: full)
    status, _, err = call("--suite", "smoke", "--run-dir", str(tmp_path / "run"))
    assert status == 3
    assert "No space left on device" in err and "Make room, then ./test_helix.sh --resume" in err


def test_interrupt_is_130_and_reports_what_was_finished(call, fake, tmp_path):
    fake(interrupt=True)
    status, out, _ = call("--suite", "smoke", "--run-dir", str(tmp_path / "x"))
    assert status == 130
    assert "no report" in out


def test_two_runs_have_two_folders(call, fake):
    runner = fake()
    call("--suite", "smoke")
    call("--suite", "smoke")
    assert runner.calls[0][1] != runner.calls[1][1]


def test_python_m_harness_is_the_same_program_and_needs_no_heavy_import():
    code = (
        "import sys, runpy; sys.argv = ['harness', '--list']\n"
        "try: runpy.run_module('harness', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = sorted({'torch', 'vllm', 'pandas', 'jinja2'} & set(sys.modules)); print(heavy, status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_python_m_harness_without_the_environment_says_what_is_missing_and_the_next_command():
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-m", "harness", "--cell", "*/i16", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=bare, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "has no module 'pydantic'; ./test_helix.sh --cell '*/i16' --list makes an environment" in line
    assert line.endswith("pip install -e '.[dev]'")


def test_what_a_run_holds_for_hours_is_without_heavy_imports():
    code = (
        "import sys, harness.cli, harness.progress, harness.runner\n"
        "heavy = {'torch', 'vllm', 'pandas', 'duckdb', 'jinja2', 'scipy.stats', 'scipy.optimize'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_unit_passes_pytest_s_arguments_and_status_on(tmp_path):
    test = tmp_path / "test_x.py"
    test.write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.server\ndef test_b(): assert 0\n"
        "@pytest.mark.nightly\ndef test_c(): assert 0\n"
        "@pytest.mark.parametrize('on', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])\n"
        "def test_d(on): assert on == 'cpu'\n"
    )
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest)

    def unit(*arguments):
        command = [sys.executable, "-m", "harness", "--unit", str(test), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})

    done = unit("-q")
    assert done.returncode == 0, done.stdout
    assert "left out: 1 'server' tests, which start real vLLM servers" in done.stdout
    assert "left out: 1 'nightly' tests" in done.stdout
    assert "left out: 1 'gpu' tests, which need a CUDA device" in done.stdout and "2 passed" in done.stdout
    assert unit("-m", "server", "-n", "0").returncode == 1
    assert unit("-k", "no_such_test", "-n", "0").returncode == 2

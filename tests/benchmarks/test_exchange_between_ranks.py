"""The exchange benchmark over real processes on gloo: what a machine with GPUs runs, less kernels and graphs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

import torch

from benchmarks import exchange
from benchmarks.cases import Case
from benchmarks.ranks import Here, chain, times
from benchmarks.records import Record, Results

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")


def bench(json_file: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.exchange", "--ranks", "2", "--tiny", "--rounds", "2"]
    return subprocess.run(
        [*command, "--json", str(json_file), *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@ON_CPU
def test_what_runs_is_measured_and_what_does_not_is_a_row_and_a_second_run_goes_on(tmp_path):
    file = tmp_path / "exchange.json"
    done = bench(file, "--only", "B1 ")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["device"] == "cpu"
    ran = {(row["operation"], *row["us"]) for row in found["rows"]}
    whole = {("exchange", "ag_rs"), ("exchange", "torch")}
    assert ran == whole | {(name, "nccl") for name in exchange.BARE}
    assert all(row["error"] <= exchange.TOLERANCE for row in found["rows"] if row["operation"] == "exchange")
    assert {row["case"] for row in found["rows"]} == {"N2 B1 H2 D16 bfloat16"} and not found["rows"][0]["graph"]
    assert {failure["what"].split()[-1] for failure in found["failures"]} == {
        "packed", "direct", "vllm_a2a", "vllm_ag_rs", "vllm_direct",
    }  # fmt: skip
    assert all("needs" in failure["error"] for failure in found["failures"])
    assert "| N2 B1 H2 D16 bfloat16 | – | – |" in done.stdout

    again = bench(file)
    assert again.returncode == 0, again.stderr[-3000:]
    after = json.loads(file.read_text())
    assert after["rows"][: len(found["rows"])] == found["rows"]  # measured once
    assert {row["case"] for row in after["rows"]} == {"N2 B1 H2 D16 bfloat16", "N2 B3 H2 D16 bfloat16"}


@pytest.fixture
def results(tmp_path):
    return Results("exchange", "command", "cpu", {}, tmp_path / "r.json", 2)


CASES = [Case(2, 1, 2, 16), Case(2, 3, 2, 16)]


def test_processes_that_end_cost_one_case(results, monkeypatch):
    """Whatever a size does to its processes, the next one is measured."""
    from torch.multiprocessing.spawn import ProcessExitedException

    asked = exchange.Asked(results.path, None, 2, 2)

    def run(ranks, work, todo, asked, results):
        case, names = todo[0]
        if case.batch == 1:
            raise ProcessExitedException("process 1 terminated with signal SIGSEGV", 1, 7, -11)
        for name in names:
            results.add(Record(f"exchange/{name}", {}, 1, 0, 1.0, 1.0, 1.0, {"case": case.name}))
        results.write()

    monkeypatch.setattr(exchange, "begun", lambda *_: results)
    monkeypatch.setattr(exchange, "run", run)
    found = exchange.measured(2, CASES, asked)
    assert {record.extra["case"] for record in found.records} == {CASES[1].name}
    assert len(found.failures) == len(exchange.SERIES) + len(exchange.BARE)
    assert all("SIGSEGV" in failure["error"] for failure in found.failures)


def test_results_of_another_machine_are_not_mixed_in(results, monkeypatch):
    asked = exchange.Asked(results.path, None, 2, 2)
    exchange.begun(asked, 2, False).write()
    assert exchange.begun(asked, 2, False).records == []
    with pytest.raises(SystemExit, match="holds another machine"):
        exchange.begun(asked, 4, False)


def test_the_reference_weighs_partials_by_their_lse():
    """By hand on two ranks: what rank 1 gets is the softmax-weighted sum of both ranks' partials of its heads."""
    case, cpu = Case(2, 3, 2, 16, torch.float32), torch.device("cpu")
    (first, first_lse), (second, second_lse) = (exchange.partial_of(case, rank, 0, cpu) for rank in range(2))
    share = torch.sigmoid(first_lse - second_lse)[:, 2:, None]
    wanted = first[:, 2:] * share + second[:, 2:] * (1 - share)
    torch.testing.assert_close(exchange.exact(case, 1, cpu).float(), wanted)


def test_a_time_is_that_of_the_slowest_rank(monkeypatch):
    from benchmarks import ranks

    here = Here(0, 2, torch.device("cpu"), None)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda *_, **__: None)

    def gathered(every, mine, group):
        every[:] = [mine, {name: [value + 1e6 for value in values] for name, values in mine.items()}]

    monkeypatch.setattr(ranks.dist, "all_gather_object", gathered)
    found = times(here, {"a": chain([lambda: None, lambda: None], here.device)}, rounds=3)
    assert found["a"].median > 1e6


def test_a_wrong_merge_is_a_failure(results, monkeypatch):
    here = Here(0, 2, torch.device("cpu"), None)
    case = CASES[0]
    monkeypatch.setattr(Here, "agree", lambda self, problem: problem)
    monkeypatch.setitem(exchange.SERIES, "torch", lambda *_: lambda output, lse: output[:, : case.heads])
    exchange.measure(here, case, ["torch"], None, results, 2)
    (failure,) = results.failures
    assert "differs from fp64" in failure["error"] and not results.records


def test_the_table_has_the_fastest_in_bold_and_a_dash_for_what_did_not_run(results):
    for name, us in (("exchange/packed", 12.0), ("exchange/direct", 8.04), ("all_to_all/nccl", 5.0)):
        results.add(Record(name, {}, 1, 0, us, us, us, {"case": "N8 B1 H2 D128 bfloat16"}))
    line = exchange.table(results).splitlines()[-1]
    assert line == "| N8 B1 H2 D128 bfloat16 | 12.0 | **8.0** | – | – | – | – | – | 5.0 |"


def test_bytes_of_the_bare_collectives():
    """N ranks: N - 1 chunks; N - 1 queries; twice N - 1 shares of an all-reduce."""
    case = Case(4, 8, 2, 128)
    found = exchange.collectives(Here(0, 4, torch.device("cpu"), None), case)
    own = 8 * 2 * 256
    sent = {name: nbytes for name, (nbytes, _) in found.items()}
    assert sent == {"all_to_all": 3 * (own + 128), "all_gather": 3 * own, "all_reduce": 6 * own}
    assert dataclasses.is_dataclass(case) and case.layout.chunk_bytes == own + 128

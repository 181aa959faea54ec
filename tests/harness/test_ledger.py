"""The ledger survives what happens to files."""

import json

from harness.cell import Cell, Mode
from harness.ledger import Ledger, read, results
from harness.result import CellResult
from harness.verdict import Verdict


def result(tp: int) -> CellResult:
    cell = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k2", tp=tp)
    return CellResult(
        cell=cell, suites=("smoke",), declared=Verdict.PASS, declared_why="", verdict=Verdict.PASS, reason="fine"
    )


def test_what_is_written_is_read_back(tmp_path):
    ledger = Ledger(tmp_path / "run")
    ledger.run_start("run", ["a"], ["cpu"], ["x"])
    ledger.cell_start("a")
    ledger.result(result(2))
    ledger.run_end()
    events, warnings = read(ledger.path)
    assert [event["event"] for event in events] == ["run-start", "cell-start", "result", "run-end"]
    assert all(event["time"].endswith("+00:00") for event in events)
    assert results(events) == [result(2)]
    assert warnings == []


def test_a_torn_last_line_is_a_warning_and_is_closed_by_the_next(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.result(result(2))
    with ledger.path.open("a") as file:
        file.write('{"event": "result", "resu')
    events, warnings = read(ledger.path)
    assert len(events) == 1 and warnings == ["ledger.ndjson:2: torn last line"]
    ledger.result(result(4))
    events, warnings = read(ledger.path)
    assert [item.cell.tp for item in results(events)] == [2, 4]
    assert len(warnings) == 1 and warnings[0].startswith("ledger.ndjson:2: not an event")


def test_lines_that_are_no_events_are_named(tmp_path):
    (tmp_path / "ledger.ndjson").write_text('[1]\n{"event": "run-end"}\n\n')
    events, warnings = read(tmp_path / "ledger.ndjson")
    assert events == [json.loads('{"event": "run-end"}')]
    assert len(warnings) == 1

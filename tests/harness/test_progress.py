"""What a run shows: the live table on a terminal, plain lines elsewhere, and the time left by past runs."""

import io

import pytest
from rich.console import Console

from harness.cell import Cell, Mode
from harness.ledger import Ledger
from harness.matrix import PlannedCell
from harness.progress import Board, Follower, TimeLeft, doing, duration, shown
from harness.result import CellResult, Phase
from harness.run import print_summary
from harness.verdict import Verdict


def cell(tp: int) -> Cell:
    return Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k2", tp=tp)


def result(tp: int, verdict: Verdict = Verdict.PASS, seconds: float = 40.0) -> CellResult:
    return CellResult(
        cell=cell(tp), suites=("smoke",), declared=Verdict.PASS, declared_why="", verdict=verdict, reason="[b]so",
        phases=(Phase(name="start", seconds=seconds),) if seconds else (),
    )  # fmt: skip


def planned(tp: int, skip: str | None = None) -> PlannedCell:
    return PlannedCell(cell=cell(tp), suites=("smoke",), declared=Verdict.PASS, declared_why="", skip=skip)


PLAN = [planned(1), planned(2), planned(4), planned(8, skip="no GPU")]
IDS = [item.cell.id for item in PLAN]


@pytest.fixture
def run(tmp_path):
    """A ledger of PLAN that has begun, and the follower of it, whose clock stands still until it is set."""
    ledger = Ledger(tmp_path)
    ledger.run_start("run", IDS, ["cpu"], [])
    now = [100.0]
    return ledger, Follower(tmp_path, clock=lambda: now[0]), now


def test_time_left_is_by_past_runs(run):
    ledger, seen, now = run
    left = TimeLeft(PLAN, jobs=1, known={IDS[0]: 30.0, IDS[1]: 60.0, IDS[2]: 90.0, IDS[3]: 1000.0})
    seen.read()
    assert left.left(seen) == 180.0  # the skipped cell takes no time
    ledger.cell_start(IDS[0])
    seen.read()
    now[0] += 20
    assert left.left(seen) == 10 + 60 + 90
    now[0] += 20  # longer than expected counts as about to end
    assert left.left(seen) == 150
    assert TimeLeft(PLAN, jobs=2, known=left.known).left(seen) == 75
    ledger.result(result(1))
    seen.read()
    assert left.said(seen) == "1 of 3 cells, about 2 min left"


def test_a_cell_that_never_ran_takes_as_long_as_those_that_did(run):
    ledger, seen, _ = run
    left = TimeLeft(PLAN, jobs=1, known={})
    assert left.left(seen) is None and left.said(seen) == "0 of 3 cells"
    ledger.result(result(1, seconds=40.0))
    seen.read()
    assert left.left(seen) == 80.0


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_a_torn_line_waits_and_foreign_ones_do_not_matter(run):
    ledger, seen, _ = run
    with ledger.path.open("a") as stream:
        stream.write('[1]\n{"event": "result", "result": {}}\n{"event": "cell-start", "id": "x"')
    seen.read()
    assert seen.running == {}
    with ledger.path.open("a") as stream:
        stream.write("}\n")
    seen.read()
    assert list(seen.running) == ["x"]
    ledger.run_start("run", IDS, ["cpu"], [])  # resumed
    seen.read()
    assert seen.running == {}


def test_what_a_cell_is_doing_shows_in_its_folder(tmp_path):
    folder = tmp_path / "cell"
    assert doing(folder) == "making the model"
    folder.mkdir()
    (folder / "server.log").write_text("INFO loading\n")
    assert doing(folder) == "starting"
    (folder / "server.log").write_text("INFO loading\nINFO:     Application startup complete.\n")
    assert doing(folder) == "answering"
    (folder / "transcript.json").write_text("{}")
    assert doing(folder) == "stopping, judging"
    (folder / "capture").mkdir()
    assert doing(folder) == "finding where it differs"


def test_the_table_shows_what_runs_what_ended_and_the_time_left(run, tmp_path):
    ledger, seen, now = run
    ledger.result(result(8, Verdict.SKIP, seconds=0))
    ledger.cell_start(IDS[0])
    ledger.result(result(1, Verdict.FAIL))
    ledger.cell_start(IDS[1])
    seen.read()
    now[0] += 12
    board = Board(seen, TimeLeft(PLAN, 1, {IDS[1]: 60.0, IDS[2]: 72.0}), {name: tmp_path / "none" for name in IDS})
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(board)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    assert [line.split() for line in lines[1:3]] == [
        ["✗", "fail", IDS[0], "40", "s"],
        ["·", "running", IDS[1], "making", "the", "model", "12", "s", "of", "60", "s"],
    ]
    assert lines[3] == "1 of 3 cells, about 2 min left   ✗ 1 fail   – 1 skip"


def test_without_a_terminal_it_is_one_plain_line_a_step(run, tmp_path, capsys):
    ledger, _, _ = run
    with shown(tmp_path, PLAN, 1, {IDS[1]: 60.0, IDS[2]: 60.0}, {}, Console(file=io.StringIO())) as progress:
        progress(f"start     {IDS[0]}")
        ledger.result(result(1))
        progress(f"pass      {IDS[0]}: \x1b[31m[b]so")
    assert capsys.readouterr().out == (
        f"start     {IDS[0]}\npass      {IDS[0]}: [b]so  (1 of 3 cells, about 2 min left)\n"
    )


def test_on_a_terminal_the_table_stands_for_its_lines_and_others_are_kept(run, tmp_path):
    ledger, _, _ = run
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with shown(tmp_path, PLAN, 1, {}, {name: tmp_path for name in IDS}, console) as progress:
        ledger.cell_start(IDS[0])
        progress(f"start     {IDS[0]}")
        ledger.result(result(1))
        progress(f"pass      {IDS[0]}: [b]so")
        progress("again     [/b]: lost to infrastructure")
    said = console.file.getvalue()
    assert "✓ pass" in said and "1 of 3 cells" in said
    assert "again     [/b]: lost to infrastructure" in said and "[b]so" not in said


def test_the_summary_shouts_that_a_limitation_is_gone(capsys):
    found = [result(1), result(2, Verdict.XPASS)]
    print_summary([found[0], found[1].model_copy(update={"declared": Verdict.XFAIL, "reason": "\x1b[2Jboth agree"})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"✓ pass      {IDS[0]}", f"! xpass     {IDS[1]}", "    declared xfail: ", "    both agree", "",
        "2 cells: 1 pass, 1 xpass", "XPASS: 1 known limitation gone. Update the declared table",
    ]  # fmt: skip

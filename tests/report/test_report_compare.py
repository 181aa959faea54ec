"""Two runs: what moved and in which order, what is new, gone or says nothing, in a terminal and for programs."""

import json

import examples
import pyarrow.parquet as pq
import pytest

from harness import cli, report
from harness.report.compare import Direction, compare
from harness.report.store import stored
from harness.result import Phase, Statistic
from harness.verdict import Verdict

BASE = examples.result(examples.cell("standard-tp", "CPU_ATTN", "cpu", examples.TINY, 4), "pass", "reference")
GQA = examples.cell("helix-gqa", "CPU_ATTN", "cpu", examples.TINY, 4, 2)


def variant(number: int):
    return GQA.model_copy(update={"serve": (*GQA.serve, ("variant", number))})


def one(number: int, verdict: str = "pass", reason: str = "because", declared: str = "pass", **more):
    return examples.result(variant(number), verdict, reason, declared=declared, **more)


@pytest.fixture
def pair(tmp_path):
    """pair(before, after) -> their Comparison; each is a list of results."""

    def make(before, after, finished=True):
        folders = []
        for day, found in enumerate((before, after), start=20):
            folder = tmp_path / "runs" / f"day-{day}"
            started = f"2026-11-{day}T03:00:00Z"
            folders.append(examples.write_ledger(folder, found, name=folder.name, started=started, finished=finished))
        return compare(*(stored(folder) for folder in folders))

    return make


def directions(found):
    return [(move.direction, move.after.id) for move in found.movers]


def test_movers_are_ranked_by_what_must_be_acted_on(pair):
    xfail = {"verdict": "xfail", "declared": "xfail"}
    before = [one(1), one(2, "fail"), one(3, **xfail), one(4), one(5, "unproven"), one(6), one(7, **xfail)]
    after = [one(1, "unproven"), one(2), one(3, "xpass", declared="xfail"), one(4, "fail"), one(5, "fail")]
    after += [one(6), one(7)]
    found = pair(before, after)
    assert directions(found) == [
        (Direction.WORSE, variant(4).id),
        (Direction.WORSE, variant(1).id),
        (Direction.XPASS, variant(3).id),
        (Direction.OTHER, variant(5).id),
        (Direction.BETTER, variant(2).id),
        (Direction.DECLARED, variant(7).id),
    ]
    assert found.same == 1
    assert found.sentence == (
        "2 worse, 1 known limitation gone, 1 wrong in another way, 1 better, 1 declared otherwise; 1 as before"
    )


def test_new_gone_and_excluded_have_their_reasons(pair):
    skip = {"verdict": "skip", "reason": "no GPU"}
    before = [one(1), one(2), one(3, **skip), one(4, "error", "port was taken"), one(5), one(6, **skip)]
    after = [one(1), one(2, "error", "disk full"), one(3, **skip), one(4), one(7), one(8, **skip)]
    found = pair(before, after)
    assert [cell.id for cell in found.new] == [variant(7).id, variant(8).id]
    assert [cell.id for cell in found.gone] == [variant(5).id, variant(6).id]
    assert found.gone_why == "not asked for"
    assert [(group.reason, group.cells, group.broken) for group in found.excluded] == [
        ("error now: disk full", (variant(2).id,), True),
        ("error before: port was taken", (variant(4).id,), False),
        ("skip in both: no GPU", (variant(3).id,), False),
    ]
    assert found.sentence == (
        "1 could no longer be judged, 2 new, 1 of them judged, 2 gone, 1 of them judged; 1 as before"
    )


def test_a_cell_that_was_planned_and_has_no_result_is_gone_for_that_reason(pair, tmp_path):
    found = pair([one(1), one(2)], [one(1)])
    ledger = found.after.folder / "ledger.ndjson"
    with ledger.open("a") as stream:
        stream.write(json.dumps({"event": "cell-start", "id": variant(2).id}) + "\n")
    assert compare(found.before, stored(found.after.folder)).gone_why == "planned, but without a result"


def test_numbers_below_the_same_verdict_move_by_factors(pair):
    def phases(seconds):
        return (Phase(name="start", seconds=seconds),)

    def largest(value):
        return (Statistic(name="largest", value=value, bound=0.01, n=9, unit="nat"),)

    before = [
        one(1, kv_cache_tokens=1000, phases=phases(20), statistics=largest(0.002)),
        one(2, kv_cache_tokens=1000, phases=phases(1), statistics=largest(0.0001)),
    ]
    after = [
        one(1, kv_cache_tokens=500, phases=phases(60), statistics=largest(0.009)),
        # a time below five seconds and a number far from its bound may do what they want
        one(2, kv_cache_tokens=1005, phases=phases(4), statistics=largest(0.0009)),
    ]
    found = pair(before, after)
    assert found.movers == () and found.same == 2
    assert [(move.name, move.was, move.now, move.factor) for move in found.numbers] == [
        ("largest statistic / bound", "0.2", "0.9", pytest.approx(4.5)),
        ("time", "20.0 s", "1 min 0 s", 3.0),
        ("KV cache tokens", "1,000", "500", 0.5),
    ]


def test_what_was_asked_otherwise_is_said(pair):
    before = [one(1, versions=(("vllm", "0.32.0"), ("torch", "2.13.0")), command="serve --a 1")]
    after = [one(1, "fail", versions=(("vllm", "0.33.0"), ("torch", "2.13.0")), command="serve --a 2")]
    (move,) = pair(before, after).movers
    assert move.asked == ("vllm 0.32.0 → vllm 0.33.0", "command: 1 → 2")


def test_a_parquet_file_of_another_ledger_is_drawn_again(tmp_path):
    folder = examples.write_ledger(tmp_path / "runs" / "a", [one(1)])
    first = stored(folder)
    assert first.file == folder / "results.parquet"
    examples.write_ledger(folder, [one(1, "fail")])
    again = stored(folder)
    assert again.header.ledger != first.header.ledger
    assert compare(again, again).same == 1
    (folder / "results.parquet").write_bytes(b"PAR1 torn")
    assert stored(folder).header == again.header
    older = pq.read_table(folder / "results.parquet").drop_columns(["nearness"])
    pq.write_table(older, folder / "results.parquet")
    assert compare(stored(folder), stored(folder)).same == 1


def test_the_command_prints_ranked_movers_and_returns_1_when_worse(tmp_path, capsys):
    examples.sequence(tmp_path)
    status = cli.main(["compare", "2026-11-21", "last", "--reports", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 1
    assert out.index("Worse (3)") < out.index("XPASS: a known limitation is gone") < out.index("Better (1)")
    assert "✓ pass → ✗ fail" in out and "⊘ xfail → ! xpass" in out
    assert "New (1)" in out and "skip in both: no blackwell GPU on this host" in out
    assert cli.main(["compare", "last", "last", "--reports", str(tmp_path)]) == 0


def test_without_runs_named_the_last_is_compared_with_the_one_before(tmp_path, capsys):
    examples.sequence(tmp_path)
    assert cli.main(["compare", "--reports", str(tmp_path), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"]) == ("2026-11-22-smoke", examples.NAME)
    assert [move["direction"] for move in found["movers"]] == ["xpass"]


def test_markdown_of_a_comparison_has_no_live_text(tmp_path, capsys):
    hostile = examples.hostile()
    for day, verdict in (("20", Verdict.PASS), ("21", Verdict.FAIL)):
        found = [hostile.model_copy(update={"verdict": verdict})]
        examples.write_ledger(tmp_path / "runs" / day, found, name=day, started=f"2026-11-{day}T00:00:00Z")
    assert cli.main(["compare", "--reports", str(tmp_path), "--format", "markdown"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("### Since 20: 1 worse; 0 as before\n") and "\\<script\\>" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["compare", "nothing"], "'nothing' is no run; the latest are: 2026-11-21-smoke, 2026-11-22-smoke"),
        (["compare", "2026-11-2"], "is the start of several runs"),
        (["compare", "previous", "2026-11-21"], "name the run to compare with"),
        (["history", "no/such/*"], "no cell of 3 runs matches"),
        (["report", "nothing"], "is no run"),
    ],
)
def test_a_run_that_is_not_there_is_bad_usage(tmp_path, capsys, argv, says):
    examples.sequence(tmp_path)
    assert cli.main([*argv, "--reports", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_report_draws_again_and_lists(tmp_path, capsys):
    examples.sequence(tmp_path)
    assert cli.main(["report", examples.NAME, "--reports", str(tmp_path)]) == 0
    page = (tmp_path / "runs" / examples.NAME / "index.html").read_text()
    assert "1 known limitation gone, 1 could no longer be judged; 22 as before." in page
    assert 'href="runs/2026-11-24-031200-smoke/index.html"' in (tmp_path / "index.html").read_text()
    assert "### Since 2026\\-11\\-22\\-smoke" in (tmp_path / "runs" / examples.NAME / "summary.md").read_text()


def test_a_run_is_compared_with_one_that_judged_enough_of_its_cells(tmp_path):
    """A run of one cell in between does not stand for the run of all."""
    cells = [one(number) for number in range(4)]
    for day, found in (("20", cells), ("21", cells[:1]), ("22", [*cells[:3], one(3, "fail")])):
        examples.write_ledger(tmp_path / "runs" / day, found, name=day, started=f"2026-11-{day}T00:00:00Z")
    page = report.write(tmp_path / "runs" / "22").read_text()
    assert "1 worse; 3 as before." in page

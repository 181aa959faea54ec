"""Each cell over the runs: first bad, last good, packed ledgers, the one table of all, and the index."""

import json
import lzma
import re
import shutil

import examples

from harness import cli, report
from harness.durations import seconds_before
from harness.report.history import find_runs, seconds_by_cell, tracks
from harness.verdict import Verdict

BY_VERDICT = {one.verdict: one.cell.id for one in examples.results()}


def test_first_bad_and_last_good(tmp_path):
    examples.sequence(tmp_path)
    found = tracks(find_runs(tmp_path))
    assert [run.name for run in found.runs] == ["2026-11-21-smoke", "2026-11-22-smoke", examples.NAME]

    def told(verdict):
        track = found.tracks[BY_VERDICT[verdict]]
        return [str(word) for _, word in track.verdicts], track.last_good, track.first_bad, track.changed

    assert told("fail") == (["pass", "fail", "fail"], 0, 1, True)
    # an error in between is neither good nor bad
    assert told("unproven") == (["pass", "error", "unproven"], 0, 2, True)
    # a limitation that is gone is news, and nothing bad
    assert told("xpass") == (["xfail", "xfail", "xpass"], 1, None, True)
    assert found.tracks[BY_VERDICT["xpass"]].gone == 2 and found.tracks[BY_VERDICT["fail"]].gone is None
    assert next(iter(found.tracks)) == BY_VERDICT["xpass"]  # it comes first
    assert told("error") == (["pass", "pass", "error"], 1, None, False)
    assert told("skip") == (["skip", "skip", "skip"], None, None, False)
    healed = found.tracks[examples.results()[8].cell.id]
    assert (healed.last_good, healed.first_bad, healed.changed) == (2, None, True)


def test_the_command_prints_each_cell_over_the_runs(tmp_path, capsys):
    examples.sequence(tmp_path)
    assert cli.main(["history", "--reports", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(BY_VERDICT["fail"])
    assert lines[at + 1 : at + 3] == [
        f"    |✓✗✗|  fail in {examples.NAME}",
        "    first bad: 2026-11-22-smoke; last good: 2026-11-21-smoke",
    ]
    gone = lines[lines.index(BY_VERDICT["xpass"]) + 2]
    assert gone == f"    XPASS, a known limitation is gone since {examples.NAME}: update the declared table"
    assert cli.main(["history", "hopper/helix-mla/FLASHMLA/*", "--reports", str(tmp_path), "--format", "json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["cells"]
    assert only["verdicts"] == [[0, "pass"], [1, "pass"], [2, "pass"]] and only["last_good"] == 2


def test_history_is_one_table_by_one_call(tmp_path):
    examples.sequence(tmp_path)
    found = report.history(tmp_path)
    assert len(found) == 31 + 32 + 32  # the first run lacks one cell
    counts = found[found["verdict"] == "fail"].groupby("run").size()
    assert counts.to_dict() == {"2026-11-21-smoke": 1, "2026-11-22-smoke": 1, examples.NAME: 1}
    assert found.groupby("place")["stat:mean KL"].count().tolist() == [13, 14, 14]  # judged, no baseline


def test_a_packed_ledger_is_a_run_like_any_other(tmp_path):
    last = examples.sequence(tmp_path)
    kept = tmp_path / "2026-11-24-kept"
    kept.mkdir()
    (kept / "ledger.ndjson.xz").write_bytes(lzma.compress((last / "ledger.ndjson").read_bytes()))
    page = report.write(kept, tmp_path).read_text()
    assert "5 cells differ" in page and "Drawn from <code>ledger.ndjson.xz</code>" in page
    assert "Since" not in page  # committed evidence is compared with committed evidence
    assert kept.name in [run.name for run in find_runs(tmp_path)]
    (kept / "ledger.ndjson.xz").write_bytes(b"\xfd7zXZ torn")
    assert "could not be read: not a whole xz file" in report.write(kept, tmp_path).read_text()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    examples.sequence(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    # root may write everywhere, so a folder stands where the file would
    for run in (tmp_path / "runs").iterdir():
        (run / "results.parquet").mkdir()
    assert len(tracks(find_runs(tmp_path)).tracks) == 32
    assert {run.file.parent.parent for run in find_runs(tmp_path)} == {tmp_path / "elsewhere"}


def test_how_long_each_cell_took_last(tmp_path):
    examples.sequence(tmp_path)
    took = seconds_by_cell(find_runs(tmp_path))
    # model 1.2, start 21.4 + TP, workload 14.8, judge 0.4, stop 2.1
    assert took[BY_VERDICT["fail"]] == 47.9
    assert BY_VERDICT["skip"] not in took
    assert seconds_before(tmp_path) == took  # by a process of its own
    assert seconds_before(tmp_path / "none") == {}


def test_no_runs_at_all(tmp_path, capsys):
    assert report.history(tmp_path / "none").empty
    assert cli.main(["history", "--reports", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    assert "None yet." in report.index(tmp_path).read_text()


def test_the_index_lists_evidence_of_every_kind_and_what_changed(tmp_path):
    last = examples.sequence(tmp_path)
    shutil.copytree(last, tmp_path / "2026-11-24-kept")
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "README.md").write_text("# First engines\n\ntext\n")
    (tmp_path / "nothing-in-it").mkdir()
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "README.md").write_text("# One matrix in two slices\n")
    first, second = examples.results()[0], examples.results()[16]  # a pass, and an unproven that was an error before
    before = second.model_copy(update={"verdict": Verdict.ERROR})
    examples.write_ledger(tmp_path / "slices" / "a", [first, before], started="2026-11-20T01:00:00Z")
    examples.write_ledger(tmp_path / "slices" / "b", [second], started="2026-11-20T02:00:00Z")
    page = report.index(tmp_path).read_text()
    committed, _, local = page.partition("Runs on this machine")
    assert "2026-11-24-kept (no page)" in committed
    assert '<a href="trial/README.md">trial</a>' in committed and "First engines" in committed
    assert "nothing-in-it" not in committed
    row = committed.partition("slices/README.md")[2].partition("</tr>")[0]
    assert "One matrix in two slices" in row and "2026-11-20 01:00" in row
    assert re.findall(r"</svg>(\w+)</span> (\d+)", row) == [("unproven", "1"), ("pass", "1")]
    assert local.index(examples.NAME) < local.index("2026-11-22-smoke") < local.index("2026-11-21-smoke")
    grid = local.partition("Cells whose verdict changed")[2]
    assert '<tr class="gone">' in grid and "XPASS: limitation gone" in grid
    assert "FLASH_ATTN" in grid and "2026-11-22-smoke<br>" in grid and "good: 2026-11-21-smoke" in grid

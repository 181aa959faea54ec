"""One issue for cells that changed their verdict: opened, updated, closed. `gh` here keeps issues in a file."""

import json
import os
import sys

import examples
import pytest

from harness import cli
from harness.chosen import Chosen
from harness.report.history import find_runs, tracks
from harness.report.issue import LABEL, news_of, publish
from harness.suite import ROOT
from harness.verdict import Verdict

GH = """#!{python}
import json, sys
from pathlib import Path
kept, words = Path({kept!r}), sys.argv[1:]
state = json.loads(kept.read_text()) if kept.exists() else []
text = sys.stdin.read()
match words[:2]:
    case ["issue", "list"]:
        print(json.dumps([{{"number": n + 1}} for n, issue in enumerate(state) if issue["open"]]))
    case ["issue", "create"]:
        state.append({{"open": True, "body": text, "comments": []}})
        print(f"https://example.org/issues/{{len(state)}}")
    case ["issue", "edit"]:
        state[int(words[2]) - 1]["body"] = text
    case ["issue", "comment"]:
        state[int(words[2]) - 1]["comments"].append(text)
    case ["issue", "close"]:
        state[int(words[2]) - 1]["open"] = False
    case ["label", "create"]:
        pass
    case _:
        sys.exit(f"unknown: {{words}}")
kept.write_text(json.dumps(state))
"""


@pytest.fixture
def gh(tmp_path, monkeypatch):
    """A `gh` on PATH; returns a function that reads its issues."""
    folder, kept = tmp_path / "bin", tmp_path / "issues.json"
    folder.mkdir()
    (folder / "gh").write_text(GH.format(python=sys.executable, kept=str(kept)))
    (folder / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: json.loads(kept.read_text()) if kept.exists() else []


def nights(folder, *verdicts: str) -> None:
    """A run a verdict, of one cell that is declared `pass`."""
    good = examples.cell("helix-gqa", "CPU_ATTN", "cpu", examples.TINY, 4, 2)
    for night, verdict in enumerate(verdicts, start=1):
        name = f"2026-11-{night:02d}"
        events = [
            {"event": "run-start", "run": name, "planned": [good.id], "time": f"{name}T02:00:00+00:00"},
            {"event": "result", "result": examples.result(good, verdict, "r").model_dump(mode="json")},
        ]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "ledger.ndjson").write_text("".join(json.dumps(event) + "\n" for event in events))


def night(folder, name: str, verdicts: dict, **start) -> None:
    """A run with these verdicts by cell; `start`: more of its run-start."""
    planned = [cell.id for cell in verdicts]
    events = [{"event": "run-start", "run": name, "planned": planned, "time": f"{name}T02:00:00+00:00", **start}]
    for cell, verdict in verdicts.items():
        told = examples.result(cell, verdict, "r").model_copy(update={"suites": ("helix-gqa",)})
        events.append({"event": "result", "result": told.model_dump(mode="json")})
    (folder / name).mkdir(parents=True)
    (folder / name / "ledger.ndjson").write_text("".join(json.dumps(event) + "\n" for event in events))


def said(folder) -> int:
    return cli.main(["issue", "--reports", str(folder), "--repository", "o/n"])


def test_an_issue_is_opened_updated_and_closed(tmp_path, gh, capsys):
    folder = tmp_path / "nights"
    nights(folder, "pass")
    assert said(folder) == 0 and gh() == []
    nights(folder, "pass", "fail")
    assert said(folder) == 0
    (issue,) = gh()
    assert "| pass | ✗ fail | 2026\\-11\\-02 | 2026\\-11\\-01 |" in issue["body"] and "pass → **fail**" in issue["body"]
    nights(folder, "pass", "fail", "fail")  # nothing moved: the same issue, no comment
    assert said(folder) == 0 and len(gh()) == 1 and gh()[0]["comments"] == []
    nights(folder, "pass", "fail", "fail", "unproven")
    assert said(folder) == 0
    (issue,) = gh()
    assert "fail → **unproven**" in issue["comments"][0] and "| 2026\\-11\\-02 | 2026\\-11\\-01 |" in issue["body"]
    nights(folder, "pass", "fail", "fail", "unproven", "pass")
    assert said(folder) == 0
    (issue,) = gh()
    assert not issue["open"] and "unproven → **pass**" in issue["comments"][1]
    nights(folder, "pass", "fail", "fail", "unproven", "pass", "fail")
    assert said(folder) == 0 and [one["open"] for one in gh()] == [False, True]


def test_a_pass_that_is_bad_says_what_was_declared(tmp_path):
    defect = CELL.model_copy(update={"fault": "lse-base-2"})
    told = examples.result(defect, "pass", "r").model_copy(update={"declared": Verdict.FAIL})
    night(tmp_path, "2026-11-01", {})
    with (tmp_path / "2026-11-01" / "ledger.ndjson").open("a") as ledger:
        ledger.write(json.dumps({"event": "result", "result": told.model_dump(mode="json")}) + "\n")
    news = news_of(tracks(find_runs(tmp_path)))
    assert "| cell | declared | verdict | first bad | last good |" in news.body
    assert "| fail | ✓ pass | " in news.body and "new → **pass** (declared fail)" in news.comment


ASKED = "vLLM 0.33.1.dev{}: {} of 30 hooked callables are as the plugin needs them\n"
GONE = "✗ vllm.a:Worker.run  (flag, any)\n    it is gone\n"


def test_a_changed_surface_is_told_once_and_keeps_the_issue_open(tmp_path, gh):
    folder = tmp_path / "nights"

    def a_night(day: int, surface: str = "") -> None:
        nights(folder, *["pass"] * day)
        if surface:
            (folder / f"2026-11-{day:02d}" / "surface.txt").write_text(surface)
        assert said(folder) == 0

    a_night(1, ASKED.format(1, 30))
    assert gh() == []
    a_night(2, GONE + ASKED.format(2, 29))
    (issue,) = gh()
    assert issue["open"] and GONE in issue["body"] and "read in 2026\\-11\\-02" in issue["body"]
    a_night(3, GONE + ASKED.format(3, 29))  # another build, the same change
    a_night(4)  # no answer
    (issue,) = gh()
    assert issue["open"] and issue["comments"] == [] and "0.33.1.dev3" in issue["body"]
    a_night(5, GONE.replace("it is gone", "new: x") + ASKED.format(5, 29))
    assert "new: x" in gh()[0]["comments"][0]
    a_night(6, ASKED.format(6, 30))
    (issue,) = gh()
    assert not issue["open"] and "30 of 30" in issue["comments"][1]


CELL = examples.cell("helix-gqa", "CPU_ATTN", "cpu", examples.TINY, 4, 2)
RENAMED = CELL.model_copy(update={"interleave": 16})
GPU = CELL.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
ALL = Chosen().model_dump(mode="json")


@pytest.mark.parametrize("start", [{"chosen": ALL}, {"chosen": {}, "asked": [ALL]}], ids=["run", "merged"])
def test_a_bad_cell_that_is_planned_no_longer_is_told_apart_and_keeps_nothing_open(tmp_path, gh, start):
    nights = tmp_path / "nights"
    night(nights, "2026-11-01", {CELL: "fail"}, **start)
    assert said(nights) == 0 and gh()[0]["open"]
    night(nights, "2026-11-02", {RENAMED: "pass"}, **start)
    assert said(nights) == 0
    (issue,) = gh()
    before, _, after = issue["body"].partition("### Planned no longer: 1 cell, bad when last run")
    assert not issue["open"] and "0 cells not as declared" in before and "interleave" not in before
    assert "| pass | ✗ fail | 2026\\-11\\-01 | 2026\\-11\\-02 |" in after
    night(nights, "2026-11-03", {CELL: "fail"}, **start)  # back again
    assert [track.id for track in news_of(tracks(find_runs(nights))).bad] == [CELL.id]


@pytest.mark.parametrize(
    ("verdicts", "start"),
    [
        ({RENAMED: "pass"}, {}),  # an old ledger: nobody knows what it was asked for
        ({RENAMED: "pass"}, {"chosen": Chosen(suites=("smoke",))}),
        ({RENAMED: "pass"}, {"chosen": Chosen(cells=(RENAMED.id,))}),
        ({GPU: "pass"}, {"chosen": Chosen()}),
        ({RENAMED: "pass"}, {"chosen": Chosen(), "planned": [RENAMED.id, CELL.id]}),  # cut off before it
    ],
    ids=["unknown", "other-suites", "other-cells", "other-hardware", "unfinished"],
)
def test_a_run_that_was_not_asked_for_it_does_not_excuse_a_bad_cell(tmp_path, verdicts, start):
    night(tmp_path, "2026-11-01", {CELL: "fail"})
    chosen = {"chosen": start["chosen"].model_dump(mode="json")} if "chosen" in start else {}
    night(tmp_path, "2026-11-02", verdicts, **{**start, **chosen})
    news = news_of(tracks(find_runs(tmp_path)))
    assert [track.id for track in news.bad] == [CELL.id] and not news.left


def test_cells_that_share_a_gpu_are_other_cells(tmp_path):
    shared = GPU.model_copy(update={"helix": (("share_gpu", True),)})
    other = RENAMED.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    night(tmp_path, "2026-11-01", {shared: "fail"})
    night(tmp_path, "2026-11-02", {other: "pass"}, chosen=ALL)
    assert not news_of(tracks(find_runs(tmp_path))).left
    night(tmp_path, "2026-11-03", {other: "pass"}, chosen=Chosen(share_gpu=True).model_dump(mode="json"))
    assert [track.id for track, _ in news_of(tracks(find_runs(tmp_path))).left] == [shared.id]


def test_the_bad_cells_of_the_committed_evidence_are_those_that_its_pages_explain():
    """A defect that could not show, which that run declared caught and suites/faults.yaml no longer does; and, on four
    H200s, one stock server, twice: the other three cells of the first run passed in the second. The two of 2026-11-24
    have other options since."""
    news = news_of(tracks(find_runs(ROOT / "reports")))
    (defect,) = (track for track in news.bad if track.id.endswith("/fault=lse-base-2:prefill"))
    assert defect.declared is Verdict.FAIL and len(news.left) == 2
    found = sorted("/".join(track.id.split("/")[1:5]) for track in news.bad if track is not defect)
    assert found == ["standard-tp/FLASH_ATTN_MLA/deepseek-v2/tp4"]
    assert {news.history.runs[without].name for _, without in news.left} == {"2026-11-26-h200-second"}


def test_a_night_that_could_not_judge_changes_nothing(tmp_path):
    nights(tmp_path, "pass", "error")
    assert news_of(tracks(find_runs(tmp_path))).changed == ()
    nights(tmp_path, "pass", "error", "fail")
    news = news_of(tracks(find_runs(tmp_path)))
    assert [(change.was, change.now) for change in news.changed] == [("pass", "fail")]
    assert [track.verdicts[-1][1] for track in news.bad] == [Verdict.FAIL]


def test_a_new_cell_is_news_only_when_it_is_bad(tmp_path):
    nights(tmp_path / "a", "pass")
    nights(tmp_path / "b", "fail")
    assert news_of(tracks(find_runs(tmp_path / "a"))).changed == ()
    assert [change.was for change in news_of(tracks(find_runs(tmp_path / "b"))).changed] == [""]


def test_the_label_is_what_finds_the_issue_again(tmp_path):
    nights(tmp_path, "fail")
    asked = []

    def gh(words, text):
        asked.append(list(words))
        return "[]" if words[:2] == ["issue", "list"] else ""

    publish(news_of(tracks(find_runs(tmp_path))), gh, "o/n")
    for words in (asked[0], asked[-1]):
        assert words[words.index("--label") + 1] == LABEL and words[words.index("--repo") + 1] == "o/n"


def test_without_a_repository_it_is_printed_and_without_runs_it_is_2(tmp_path, capsys):
    nights(tmp_path / "a", "fail")
    assert cli.main(["issue", "--reports", str(tmp_path / "a")]) == 0
    assert "1 cell not as declared" in capsys.readouterr().out
    assert cli.main(["issue", "--reports", str(tmp_path / "none")]) == 2


def test_gh_that_fails_is_infrastructure(tmp_path, monkeypatch, capsys):
    nights(tmp_path / "a", "fail")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said(tmp_path / "a") == 3

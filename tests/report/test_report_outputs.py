"""The machine-readable outputs tell the same as the ledger, and stay well-formed over hostile text."""

import csv
import fnmatch
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import examples
import pandas as pd
import pytest

from harness import report
from harness.report import badge, machine, text
from harness.report.measured import measured
from harness.report.run import Run
from harness.suite import ROOT
from harness.verdict import Effect


def strict_junit(root):
    """The shape that CI systems' JUnit schemas share: required attributes, order of children, true counts."""
    assert root.tag == "testsuites"
    for suite in root:
        assert set(suite.attrib) >= {
            "name",
            "timestamp",
            "hostname",
            "tests",
            "failures",
            "errors",
            "time",
            "id",
            "package",
        }
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
        tags = [child.tag for child in suite]
        cases = suite.findall("testcase")
        assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        assert int(suite.get("tests")) == len(cases)
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(attribute)) == len(suite.findall(f"testcase/{tag}"))
        for case in cases:
            assert set(case.attrib) == {"name", "classname", "time"} and float(case.get("time")) >= 0
            assert len(case) <= 1
            assert all(child.get("type") and child.get("message") for child in case if child.tag != "skipped")


def test_junit_counts_each_part_of_the_exit_status(run_dir):
    root = ET.parse(run_dir / "junit.xml").getroot()
    strict_junit(root)
    effects = Counter(one.effect for one in examples.results())
    assert len(root.findall(".//failure")) == effects[Effect.DIFFERS] == 5
    assert len(root.findall(".//error")) == effects[Effect.INFRASTRUCTURE] == 1
    assert len(root.findall(".//skipped")) == effects[Effect.NEUTRAL] == 7
    assert [suite.get("name") for suite in root] == [
        "helix.blackwell",
        "helix.blackwell-rtx",
        "helix.cpu",
        "helix.hopper",
    ]


def test_junit_survives_hostile_text(hostile_dir):
    root = ET.parse(hostile_dir / "junit.xml").getroot()
    strict_junit(root)
    assert any("window.pwned" in (failure.text or "") for failure in root.iter("failure"))


@pytest.mark.parametrize("which", ["run_dir", "hostile_dir"])
def test_results_json_fits_its_published_schema(which, request):
    jsonschema = pytest.importorskip("jsonschema")
    value = json.loads((request.getfixturevalue(which) / "results.json").read_text())
    published = json.loads(machine.SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator(published).validate(value)
    assert sum(value["counts"].values()) == len(value["cells"])


def test_published_schema_is_the_code_s():
    assert json.loads(machine.SCHEMA_FILE.read_text()) == json.loads(machine.schema()), (
        "the record changed: run python -m harness.report.machine"
    )


def test_results_json_holds_the_ledger_s_records(run_dir):
    value = json.loads((run_dir / "results.json").read_text())
    assert value["schema_version"] == 1 and value["exit_status"] == 1
    assert [entry["result"] for entry in value["cells"]] == [one.model_dump(mode="json") for one in examples.results()]


def test_frame_and_csv(run_dir):
    frame = report.frame(run_dir)
    read = pd.read_csv(run_dir / "results.csv", keep_default_na=False)
    assert list(frame["id"]) == list(read["id"]) == [one.cell.id for one in examples.results()]
    row = frame[(frame["column"] == "Helix") & (frame["backend"] == "CPU_ATTN")].iloc[0]
    assert row["kv_ratio"] == 2.0 and row["tpa"] == 2 and row["stat:mean KL"] == 1.4e-6
    counts = frame.pivot_table(index="backend", columns="column", values="id", aggfunc="count")
    assert counts.loc["FLASH_ATTN", "Helix"] == 3


def test_csv_survives_hostile_text(hostile_dir):
    with (hostile_dir / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows[:-1]] == [one.cell.id for one in examples.results()]
    assert "</script>" in rows[-1]["reason"] and not re.search("[\x00\x1b\u202e]", str(rows[-1]))
    assert None not in rows[-1] and None not in rows[-1].values()


def test_markdown_holds_the_matrix_and_no_live_text(run_dir, hostile_dir):
    summary = (run_dir / "summary.md").read_text()
    assert summary.startswith("## Helix: 5 cells differ from what is declared\n")
    assert "**! XPASS: 1 known limitation gone. Update the declared table:** hopper/helix\\-gqa/FLASHINFER" in summary
    assert "**✗ fail, 2 cells: 1 fail, 1 pass, ≠ declared pass**" in summary
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11, 14}  # 1 + 9 or 12 columns
    hostile = (hostile_dir / "summary.md").read_text()
    assert not re.search(r"(?<!\\)<", hostile) and "\x1b" not in hostile


def test_cells_whose_ranks_shared_a_gpu_say_so_and_are_counted(tmp_path):
    """Their times say nothing; a cell that did not run, or was refused, is not counted."""
    shared, skipped, refused, alone = (
        examples.cell("helix-gqa", "FLASH_ATTN", "hopper", model, 4, 2, helix=helix)
        for model, helix in (
            *((f"m{number}", (("share_gpu", True),)) for number in range(3)),
            ("m3", ()),
        )
    )
    made = [
        examples.result(shared, "pass", ""), examples.result(skipped, "skip", ""),
        examples.result(refused, "rejected", "", declared="rejected"), examples.result(alone, "pass", ""),
    ]  # fmt: skip
    page = report.write(examples.write_ledger(tmp_path, made))
    said = "Of 1 all ranks were on one GPU: for validation, not for speed."
    assert said in page.read_text() and said in (tmp_path / "summary.md").read_text()
    assert page.read_text().count("all ranks on one GPU: for validation, not for speed</span>") == 3
    other = report.write(examples.write_ledger(tmp_path / "other", made[3:]))
    assert "all ranks" not in other.read_text()


def test_rerun_line_names_this_cell_only():
    cell_id = examples.hostile().cell.id
    word, option, pattern = shlex.split(text.rerun(cell_id))
    assert (word, option) == ("./test_helix.sh", "--cell")
    assert fnmatch.fnmatchcase(cell_id, pattern)
    others = [one.cell.id for one in examples.results()]
    assert not any(fnmatch.fnmatchcase(other, pattern) for other in others)
    for other in others:
        assert [one for one in others if fnmatch.fnmatchcase(one, shlex.split(text.rerun(other))[-1])] == [other]


def test_clean_drops_terminal_escapes_and_marks_controls():
    assert text.clean("\x1b[1;31mred\x1b[0m\r\nx\x00\u202ey\tz") == "red\nx��y\tz"


class Matrix(HTMLParser):
    """Text of each row of the matrices by backend or by model, as a reader's program sees it."""

    def __init__(self, by):
        super().__init__()
        self.by = by
        self.rows, self.cell, self.inside, self.head = [], None, False, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside = attrs.get("data-by") == self.by if tag == "table" else self.inside
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.cell = []
            self.head.append((tag, attrs.get("scope")))

    def handle_endtag(self, tag):
        if tag == "table":
            self.inside = False
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append(" ".join(" ".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data):
        if self.inside and self.cell is not None:
            self.cell.append(data)


def test_the_matrix_s_text_equals_the_ledger(run_dir):
    page = (run_dir / "index.html").read_text()
    matrix = Matrix("backend")
    matrix.feed(page)
    assert all(scope in ("col", "colgroup", "row") for tag, scope in matrix.head if tag == "th")
    none = "· no cell"
    # Hardware on which something ran, cpu and hopper; then, in a table of its own, the blackwell that is not here.
    assert [row[1:] for row in matrix.rows if row[0].replace(" ", "") == "FLASH_ATTN"] == [
        [
            *[none] * 3,
            "pass 1 cell declared pass",
            "rejected 1 cell ≠ differs from declared pass",
            "fail 2 cells: 1 fail, 1 pass ≠ differs from declared pass",
        ],
        [none, none, "skip 1 cell declared pass"],
    ]
    assert "Declared, but not run here: 6 cells on blackwell, blackwell-rtx" in page
    (mla,) = [row[1:] for row in matrix.rows if row[0].replace(" ", "") == "CPU_MLA"]
    assert mla[:3] == [
        "pass 1 cell declared pass",
        "pass 1 cell declared pass",
        "unproven 2 cells: 1 unproven, 1 rejected ≠ differs from declared pass",
    ]
    models = Matrix("model")
    models.feed(page)
    by_model = {row[0].replace(" ", ""): row[1:] for row in models.rows}
    assert by_model["recipe:tiny-qwen3-gqa4"][:3] == ["pass 1 cell declared pass", none, "pass 1 cell declared pass"]
    for found in (matrix, models):
        said = " ".join(cell for row in found.rows for cell in row)
        counted = sum(int(count) for count in re.findall(r"\b(\d+) cells?\b", said))
        assert counted == sum(one.cell.fault is None for one in examples.results())


def test_a_measured_cell_is_not_said_to_answer_as_standard_tp_does(tmp_path):
    cell = examples.cell("helix-gqa", "FLASH_ATTN", "hopper", "m0", 4, 2)
    said = "Helix answers as standard TP does on"
    for name, bench in (("measured", examples.bench()), ("judged", None)):
        page = report.write(examples.write_ledger(tmp_path / name, [examples.result(cell, "pass", "", bench=bench)]))
        assert (said in page.read_text()) is (bench is None)
        assert "No square shows Helix passing" not in page.read_text()


def test_measured_numbers_are_told_with_their_side_of_the_baseline():
    found = measured(examples.bench())
    (load,) = found.loads
    assert load.title == "8,192 tokens in, 128 out, 8 at a time, 24 requests, 1 failed at the baseline"
    assert [(line.name, line.ratio, line.tone) for line in load.lines] == [
        ("ITL p50", "× 0.75 (0.7125 to 0.7875)", "better"),
        ("time to first token", "× 1.5 (1.425 to 1.575)", "worse"),
        ("output throughput", "× 1.02 (0.969 to 1.071)", ""),
    ]
    assert load.lines[0].cell == "12 ms (11.4 to 12.6)"
    assert measured(None) is None


@pytest.mark.parametrize(
    ("verdicts", "said", "colour"),
    [
        (["pass", "fail", "xpass"], "✗ 1 fail, 1 xpass", "#a11318"),
        (["pass", "error"], "⚠ 1 error", "#0b566b"),
        (["pass", "pass", "skip"], "✓ 2 pass", "#12633a"),
        (["skip"], "– 1 skip", "#4b5768"),
        ([], "nothing ran", "#4b5768"),
    ],
)
def test_the_badge_says_what_differs_or_what_passed(verdicts, said, colour):
    of = [examples.cell("helix-gqa", "CPU_ATTN", "cpu", f"m{number}", 4, 2) for number in range(len(verdicts))]
    run = Run(name="x", results=tuple(examples.result(one, word, "") for one, word in zip(of, verdicts, strict=True)))
    root = ET.fromstring(badge.badge(run))
    texts = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["Helix", said]
    assert colour in badge.badge(run)


def test_parquet_holds_the_frame(run_dir):
    pd.testing.assert_frame_equal(
        pd.read_parquet(run_dir / "results.parquet"), report.frame(run_dir), check_dtype=False
    )


def test_the_documented_notebook_runs(monkeypatch):
    """The snippets of docs/report.md, as they stand there, over the committed evidence."""
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("docs/report.md").read_text(), re.DOTALL)
    found = {}
    exec(compile(snippet, "docs/report.md", "exec"), found)
    assert len(found["cells"]) == len(json.loads(Path("reports/2026-11-26-cpu/results.json").read_text())["cells"])
    assert set(found["runs"]["run"]) >= {"2026-11-26-cpu", "2026-11-24-h200"}


def test_the_page_names_nothing_to_load(run_dir):
    page = (run_dir / "index.html").read_text()
    assert not re.search(r"""\b(?:src|href|xlink:href)=["']?(?:https?:)?//""", page)
    assert "default-src 'none'" in page


def test_index_lists_committed_evidence_and_local_runs(tmp_path):
    for name, folder in (("kept", tmp_path / "kept"), ("local", tmp_path / "runs" / "local")):
        report.write(examples.write_ledger(folder, examples.results(), name=name))
    page = report.index(tmp_path).read_text()
    committed, _, local = page.partition("Runs on this machine")
    assert 'href="kept/index.html">kept<' in committed and 'href="runs/local/index.html">local<' in local
    assert page.count("5 cells differ") == 2


def test_two_hundred_cells_stay_under_three_megabytes(tmp_path):
    page = report.write(examples.write_ledger(tmp_path, examples.many(200)))
    assert page.stat().st_size < 3_000_000


def test_planted_defects_have_a_table_of_their_own(tmp_path):
    """What was caught, by what, how far beyond; what was not is said first, with its reason."""
    from harness.cell import Cell
    from harness.ledger import Ledger
    from harness.report import write
    from harness.result import CellResult, Statistic
    from harness.verdict import Verdict

    change = Statistic(name="decode: largest logprob change", value=3.0, bound=1e-4, n=9, unit="nat")
    ledger = Ledger(tmp_path)
    for fault, declared, verdict, found in (
        ("drop-shard", Verdict.FAIL, Verdict.FAIL, (change,)),
        ("other-combine", Verdict.FAIL, Verdict.UNPROVEN, ()),
        ("query-head-off-by-one", Verdict.PASS, Verdict.PASS, ()),
    ):
        cell = Cell(mode="helix-gqa", backend="HELIX_CPU", hardware="cpu", model="recipe:x", tp=2, kvp=2, fault=fault)
        ledger.result(
            CellResult(
                cell=cell, suites=("faults",), declared=declared, declared_why="<b>no KV heads</b>", verdict=verdict,
                reason="r", statistics=found,
            )
        )  # fmt: skip
    page = write(tmp_path).read_text()
    table = page[page.index('id="defects"') : page.index("</section>", page.index('id="defects"'))]
    assert "2 of 3 planted defects caught" in table
    assert "30,000" in table and "proof of path" in table
    assert "<strong>not caught</strong>: &lt;b&gt;no KV heads&lt;/b&gt;" in table
    order = [table.index(name) for name in ("query-head-off-by-one", "drop-shard", "other-combine")]
    assert order == sorted(order)


def test_alarms_among_right_servers_are_shown_where_they_lie_beside_the_run(tmp_path, capsys):
    alone = report.write(examples.write_ledger(tmp_path / "a", examples.many(2))).read_text()
    assert 'id="alarms"' not in alone
    folder = tmp_path / "b"
    shutil.copytree(tmp_path / "a", folder)
    shutil.copy(ROOT / "reports" / "2026-11-26-oracle" / "alarms.json", folder)
    page = report.write(folder).read_text()
    table = page[page.index('id="alarms"') : page.index("</section>", page.index('id="alarms"'))]
    assert "1,077 comparisons of 492 transcripts" in table and table.count("<tr>") == 13
    assert '<td class="n">1.00 %</td><td class="n">0</td><td class="n">1077</td>' in table
    (folder / "alarms.json").write_text('{"x": 1}')
    assert 'id="alarms"' not in report.write(folder).read_text()
    assert "alarms.json is no table of `python -m harness alarms --json`; left out" in capsys.readouterr().err

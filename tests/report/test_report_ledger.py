"""What is made of a ledger that is torn, old, foreign or random: a page, which says what it left out."""

import json

import examples
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import escape

from harness import report
from harness.report.compare import compare
from harness.report.history import find_runs
from harness.report.run import load

PASS = examples.results()[0]


def test_a_whole_ledger_leaves_nothing_out(run_dir):
    run = load(run_dir)
    assert (run.name, run.left_out, run.unfinished, run.exit_status) == ("2026-11-24-031200-smoke", (), (), 1)
    assert run.results == tuple(examples.results())


def test_torn_unknown_and_old_records_are_named(hostile_dir):
    run = load(hostile_dir)
    assert len(run.results) == len(examples.results()) + 1
    assert run.ended == ""
    said = "\n".join(run.left_out)
    assert len(run.left_out) == 3
    assert "torn last line" in said and "unknown event 'lunch'" in said and "result does not fit" in said
    assert "torn last line" in (hostile_dir / "index.html").read_text()


def test_planned_and_started_cells_without_a_result_are_unfinished(tmp_path):
    lines = [{"event": "run-start", "planned": ["a/b", PASS.cell.id]}, {"event": "cell-start", "id": "c/d"}]
    lines.append({"event": "result", "result": PASS.model_dump(mode="json")})
    (tmp_path / "ledger.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load(tmp_path).unfinished == ("a/b", "c/d")
    page = report.write(tmp_path).read_text()
    assert "2 planned cells without a result" in page and "<code>c/d</code>" in page


def test_attempts_of_a_cell_are_told_in_order(tmp_path):
    folder = examples.write_ledger(tmp_path, [PASS])
    with (folder / "ledger.ndjson").open("a") as stream:
        for number, (verdict, cause) in enumerate([("error", "out of memory"), ("pass", None)], start=1):
            told = {
                "id": PASS.cell.id,
                "number": number,
                "verdict": verdict,
                "reason": f"said {number}",
                "cause": cause,
            }
            stream.write(json.dumps({"event": "attempt", **told, "time": "2026-11-24T03:12:00Z"}) + "\n")
    assert [one.verdict for one in load(folder).tries[PASS.cell.id]] == ["error", "pass"]
    page = report.write(folder).read_text()
    assert page.count("Attempts in this run") == 1
    assert "2026-11-24 03:12:00 · out of memory</span> said 1" in page


def test_a_whole_log_is_inside_where_it_is_small_and_linked_always(tmp_path):
    small, large = examples.results()[:2]
    folder = examples.write_ledger(tmp_path, [small, large])
    noise = "".join(f"{number * 7919 % 1_000_003:x} " for number in range(60_000))
    for one, text in ((small, "the very first line\n" * 30), (large, f"the very first line\n{noise}")):
        place = folder / "cells" / f"a=b__{one.cell.key[:8]}"
        place.mkdir(parents=True)
        (place / "server.log").write_text(text)
    page = report.write(folder).read_text()
    bodies = [page.partition(f'data-id="{one.cell.id}"')[2].partition("</details>")[0] for one in (small, large)]
    for one, body in zip((small, large), bodies, strict=True):
        assert f'<a href="cells/a%3Db__{one.cell.key[:8]}/server.log">the whole file</a>' in body
    assert "Show all 30 lines" in bodies[0]
    assert "Show all 40 lines" in bodies[1]  # the recorded tail


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"image": "sha256:f00d", "code": "abc123"}, "sha256:f00d"),
        ({"image": ""}, "processes of the host"),
        (7, "none:"),
    ],
)
def test_the_image_of_a_run_is_told_where_it_has_one(tmp_path, setting, said):
    folder = examples.write_ledger(tmp_path, [PASS])
    with (folder / "ledger.ndjson").open("a") as stream:
        stream.write(json.dumps({"event": "run-start", "run": "x", "setting": setting}) + "\n")
    page = report.write(folder).read_text()
    fact = page.partition("<dt>image digest</dt><dd>")[2].partition("</dd>")[0]
    assert said in fact


def test_a_resumed_run_began_when_it_first_began(tmp_path):
    folder = examples.write_ledger(tmp_path, [PASS], started="2026-11-24T01:00:00Z")
    with (folder / "ledger.ndjson").open("a") as stream:
        stream.write(json.dumps({"event": "run-start", "run": "again", "time": "2026-11-24T09:00:00Z"}) + "\n")
    assert load(folder).started == "2026-11-24T01:00:00Z"


def test_the_last_result_of_a_cell_counts_and_the_first_is_kept(tmp_path):
    first = examples.result(PASS.cell, "error", "port was taken")
    examples.write_ledger(tmp_path, [first, PASS])
    run = load(tmp_path)
    assert [one.verdict for one in run.results] == ["pass"]
    assert run.earlier == {PASS.cell.id: (first,)}
    assert "port was taken" in report.write(tmp_path).read_text()


def test_no_ledger_is_a_page_that_says_so(tmp_path):
    page = report.write(tmp_path).read_text()
    assert "could not be read" in page and "No cell has a result yet" in page
    assert report.frame(tmp_path).empty


def test_null_statistics_and_lone_surrogates_are_mended(tmp_path):
    record = examples.hostile().model_dump(mode="json")
    record["statistics"][0]["value"] = None
    record["log_tail"] = "\udcff"
    (tmp_path / "ledger.ndjson").write_text(json.dumps({"event": "result", "result": record}) + "\n")
    (found,) = load(tmp_path).results
    assert found.statistics[0].value != found.statistics[0].value
    report.write(tmp_path)


def test_numbers_that_make_no_sense_are_shown_or_named(tmp_path):
    odd = PASS.model_dump(mode="json") | {"phases": [{"name": "start", "seconds": float("nan")}]}
    huge = examples.results()[1].model_dump(mode="json") | {"kv_cache_tokens": 10**400}
    lines = [json.dumps({"event": "result", "result": one}) + "\n" for one in (odd, huge)]
    (tmp_path / "ledger.ndjson").write_text("".join(lines))
    page = report.write(tmp_path).read_text()
    assert "nan s" in page and "kv_cache_tokens: out of range" in page


texts = st.one_of(
    st.text(max_size=30), st.just(examples.HOSTILE), st.sampled_from(["\x00", "\ud800", "]]>", "{{ 7*7 }}"])
)
loose = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
numbers = st.one_of(st.integers(-3, 40), st.integers())
floats = st.floats()
token = st.tuples(st.integers(), floats)


points = st.fixed_dictionaries(
    {"low": numbers, "high": numbers, "n": numbers, "kl": floats, "worst": floats, "null": st.none() | floats}
).flatmap(lambda point: floats.map(lambda band: point | {"band": band}))


intervals = st.fixed_dictionaries(
    {"value": floats, "low": st.none() | floats, "high": st.none() | floats, "n": numbers}
)
measures = st.tuples(texts, intervals, intervals, st.none() | intervals).map(
    lambda drawn: (
        examples.bench().model_dump(mode="json")
        | {
            "loads": [
                examples.bench().loads[0].model_dump(mode="json")
                | {"metrics": [dict(zip(("name", "cell", "baseline", "ratio"), drawn, strict=True)) | {"unit": "ms"}]}
            ]
        }
    )
)


@st.composite
def records(draw):
    """A result with random text and numbers, and sometimes a field that does not belong."""
    record = draw(st.sampled_from(examples.results())).model_dump(mode="json")
    cell = record["cell"]
    cell |= {
        "backend": draw(texts),
        "hardware": draw(texts),
        "model": draw(texts),
        "tp": draw(numbers),
        "kvp": draw(numbers),
    }
    record |= {
        "reason": draw(texts),
        "log_tail": draw(texts),
        "verdict": draw(st.sampled_from([*["pass", "fail", "skip", "xpass", "error", "rejected", "stale", "later"]])),
        "proof": draw(st.lists(st.dictionaries(texts, loose, max_size=3), max_size=2)),
        "kv_cache_tokens": draw(st.none() | numbers),
        "statistics": [
            {"name": draw(texts), "value": draw(floats), "bound": draw(st.none() | floats), "n": 1, "unit": ""}
        ],
        "phases": [{"name": draw(texts), "seconds": draw(floats)}],
        "differences": [
            {
                "prompt": draw(texts),
                "step": draw(numbers),
                "position": draw(numbers),
                "baseline": draw(st.lists(token, max_size=2)),
                "candidate": draw(st.lists(token, max_size=2)),
                "texts": draw(st.lists(st.tuples(st.integers(), texts), max_size=2)),
            }
        ],
    }
    record |= {
        "curve": draw(st.lists(points, max_size=2)),
        "versions": draw(st.lists(st.tuples(texts, texts), max_size=2)),
        "started": draw(texts),
        "attempts": draw(numbers),
        "baseline_id": draw(st.none() | texts),
        "bench": draw(st.none() | measures),
    }
    if draw(st.booleans()):
        draw(st.sampled_from([record, cell]))[draw(texts)] = draw(loose)
    for name in draw(st.lists(st.sampled_from([*record, *cell]), max_size=2)):  # as an older version wrote it
        record.pop(name, None)
        cell.pop(name, None)
    return {"event": "result", "result": record}


event = st.one_of(
    records(),
    records(),
    st.fixed_dictionaries(
        {"event": st.sampled_from(["run-start", "cell-start", "attempt", "models", "run-end", "result", "odd"])}
    ).flatmap(
        lambda base: st.dictionaries(
            st.sampled_from(
                ["run", "time", "hardware", "argv", "planned", "id", "cell", "result", "number", "verdict", "models"]
            ),
            loose,
        ).map(lambda more: base | more)
    ),
    loose,
)
#: Bytes of a disk that lost its mind, as a line of their own between the others.
garbage = st.none() | st.binary(max_size=30) | st.sampled_from([b"\xff\xfe\x00", b"{", b"\xed\xa0\x80", b'"\\ud800"'])
ledgers = st.tuples(st.lists(event, max_size=5), st.integers(0, 40), garbage)
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check(reports, events, cut, noise):
    """Draw a ledger of `events` that lost its last `cut` bytes, beside the run that was there before.

    `noise`, where there is some, stands in its middle.
    """
    run_dir = reports / "runs" / "b"
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one).encode() + b"\n" for one in events]
    lines[len(lines) // 2 : len(lines) // 2] = [] if noise is None else [noise + b"\n"]
    text = b"".join(lines)
    (run_dir / "ledger.ndjson").write_bytes(text[: len(text) - cut] if cut else text)
    page = report.write(run_dir).read_text()
    run = load(run_dir)
    assert page.rstrip().endswith("</html>")
    assert page.count('<details class="cell') == len(run.results)
    assert page.count("<script") == 1
    results = [one for one in events if isinstance(one, dict) and one.get("event") == "result"]
    if not cut:
        told = len(run.results) + sum(len(one) for one in run.earlier.values()) + len(run.left_out)
        assert told >= len(results)  # drawn or named, never lost
    for number, sentence in enumerate(run.left_out[:200]):
        assert str(escape(sentence)) in page, number
    assert report.index(reports).read_text().rstrip().endswith("</html>")
    assert len(report.history(reports)) >= len(run.results)
    both = find_runs(reports)
    compare(both[0], both[-1])


@pytest.fixture(scope="module")
def with_a_run(tmp_path_factory):
    """A reports folder that holds the example run."""
    reports = tmp_path_factory.mktemp("fuzz")
    examples.write_ledger(reports / "runs" / "a", examples.results()[:6], name="a", started="2026-11-01T00:00:00Z")
    return reports


@settings(max_examples=25, **FUZZ)
@given(ledgers)
def test_random_ledgers_never_break_the_build(with_a_run, found):
    check(with_a_run, *found)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@settings(max_examples=1000, **FUZZ)
@given(ledgers)
def test_a_thousand_random_ledgers_never_break_the_build(with_a_run, found):
    check(with_a_run, *found)

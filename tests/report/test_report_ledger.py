"""What is made of a ledger that is torn, old, foreign or random: a page, which says what it left out."""

import json

import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import report
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
            }
        ],
    }
    if draw(st.booleans()):
        draw(st.sampled_from([record, cell]))[draw(texts)] = draw(loose)
    return {"event": "result", "result": record}


event = st.one_of(
    records(),
    records(),
    st.fixed_dictionaries({"event": st.sampled_from(["run-start", "cell-start", "run-end", "result", "odd"])}).flatmap(
        lambda base: st.dictionaries(
            st.sampled_from(["run", "time", "hardware", "argv", "planned", "id", "cell", "result"]), loose
        ).map(lambda more: base | more)
    ),
    loose,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=st.lists(event, max_size=5), cut=st.integers(0, 40))
def test_random_ledgers_never_break_the_build(tmp_path_factory, events, cut):
    run_dir = tmp_path_factory.mktemp("fuzz")
    text = "".join(json.dumps(one) + "\n" for one in events).encode()
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

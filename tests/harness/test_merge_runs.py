"""Several ledgers as one: what counts, what is missing, what is refused."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from harness import cli
from harness.cell import Cell, Mode
from harness.chosen import Chosen, find_run
from harness.ledger import Ledger
from harness.report.run import load
from harness.result import CellResult
from harness.suite import ROOT
from harness.verdict import Verdict

VERSIONS = (("vllm", "0.32.0"), ("torch", "2.13.0"), ("helix", "0.1.0"))
MODEL = "recipe:llama-k4"
BASE = Cell(mode=Mode.STANDARD_TP, backend="FLASH_ATTN", hardware="hopper", model=MODEL, tp=4)
HELIX = Cell(mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model=MODEL, tp=4, kvp=2)
OTHER = HELIX.model_copy(update={"interleave": 16})


def result(cell: Cell, verdict: str = "pass", reason: str = "r", **fields) -> CellResult:
    return CellResult(**{
        "cell": cell, "suites": ("s",), "declared": Verdict.PASS, "declared_why": "w", "verdict": verdict,
        "reason": reason, "versions": VERSIONS, **fields,
    })  # fmt: skip


def run_of(folder: Path, results, planned=(), chosen: Chosen | None = None, code="c", keys=None, name="") -> Path:
    """A run's folder with this ledger; `name`: what it calls itself; `keys`: what a verdict depends on, by cell id."""
    ledger = Ledger(folder)
    names = list(planned) or [one.cell.id for one in results]
    chosen = (chosen or Chosen(suites=("s",))).model_dump(mode="json")
    ledger.run_start(name or folder.name, names, [f"host of {folder.name}"], [], chosen, None, {"code": code})
    for one in results:
        ledger.result(one, (keys or {}).get(one.cell.id, f"{folder.name}{one.cell.key}"))
    ledger.run_end()
    return folder


@pytest.fixture
def merged(tmp_path, capsys):
    def merged(*folders, allow=()):
        into = tmp_path / "merged"
        words = [word for kind in allow for word in ("--allow", kind)]
        status = cli.main(["merge", *map(str, folders), "--into", str(into), *words])
        told = capsys.readouterr()
        return status, load(into) if status != 2 else None, told.out + told.err

    return merged


def verdicts(run) -> dict[str, str]:
    return {one.cell.id: str(one.verdict) for one in run.results}


def test_hosts_with_other_hardware_fill_each_other_s_gaps(tmp_path, merged):
    cpu = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model=MODEL, tp=4)
    first = run_of(
        tmp_path / "a", [result(cpu), result(BASE, "skip", "no hopper here"), result(HELIX, "skip", "no hopper here")]
    )
    second = run_of(tmp_path / "b", [result(cpu, "skip", "no cpu"), result(BASE), result(HELIX, "fail", "differs")])
    status, run, told = merged(first, second)
    assert verdicts(run) == {cpu.id: "pass", BASE.id: "pass", HELIX.id: "fail"} and status == 1
    assert run.hardware == ("host of a", "host of b") and not run.earlier and not run.unfinished
    assert "expected 3, got 3" in told


def test_what_is_missing_is_said_by_name(tmp_path, merged):
    chosen = [Chosen(suites=("s",), shard=f"{part}/3", expected=(BASE.id, HELIX.id, OTHER.id)) for part in (1, 2)]
    first = run_of(tmp_path / "a", [result(BASE), result(HELIX)], chosen=chosen[0])
    second = run_of(tmp_path / "b", [result(BASE)], chosen=chosen[1])
    status, run, told = merged(first, second)
    assert status == 3 and "expected 3, got 2" in told
    assert f"missing: {OTHER.id} (planned by a)" in told and "shard 3/3 is missing" in told
    assert run.unfinished == (OTHER.id,)
    found = json.loads((tmp_path / "merged" / "expected.json").read_text())
    assert found["missing"] == {OTHER.id: "a"} and found["shards missing"] == ["3/3"]


def test_a_baseline_that_two_shards_ran_alike_is_one_row_without_a_past(tmp_path, merged):
    chosen = [Chosen(shard=f"{part}/2", expected=(BASE.id, HELIX.id)) for part in (1, 2)]
    same = {BASE.id: "asked alike"}
    first = run_of(tmp_path / "a", [result(BASE), result(HELIX)], chosen=chosen[0], keys=same)
    second = run_of(tmp_path / "b", [result(BASE)], chosen=chosen[1], keys=same)
    status, run, _ = merged(first, second)
    assert status == 0 and len(run.results) == 2 and not run.earlier


def test_the_same_question_judged_differently_is_flaky(tmp_path, merged):
    same = {HELIX.id: "asked alike"}
    first = run_of(tmp_path / "a", [result(HELIX, "pass", "agrees")], keys=same)
    second = run_of(tmp_path / "b", [result(HELIX, "fail", "differs")], keys=same)
    status, run, _ = merged(first, second)
    assert status == 1 and verdicts(run) == {HELIX.id: "flaky"}
    assert run.results[0].reason == "runs disagree: pass in a: agrees; fail in b: differs"


def test_of_nights_the_latest_judged_counts_and_the_earlier_stay_in_the_history(tmp_path, merged):
    nights = [
        run_of(tmp_path / name, [result(HELIX, verdict, name)])
        for name, verdict in (("n1", "fail"), ("n2", "pass"), ("n3", "error"), ("n4", "skip"))
    ]
    _, run, told = merged(*reversed(nights))
    assert verdicts(run) == {HELIX.id: "pass"} and f"judged otherwise by an earlier run: {HELIX.id}" in told
    assert [str(one.verdict) for one in run.earlier[HELIX.id]] == ["fail", "error"]


@pytest.mark.parametrize(
    ("kind", "says", "second"),
    [
        ("versions", "vllm of cells for vLLM 0.32.0: 0.31.0 in b; 0.32.0 in a",
         {"results": [result(OTHER, versions=(("vllm", "0.31.0"),))]}),
        ("versions", "torch on hopper, vLLM 0.32.0: 2.12.0 in b; 2.13.0 in a",
         {"results": [result(OTHER, versions=(("torch", "2.12.0"),))]}),
        ("suites", "asked for different cells: s (a); t (b)",
         {"results": [result(OTHER)], "chosen": Chosen(suites=("t",))}),
        ("suites", "1 name declared otherwise in different runs", {"results": [result(HELIX, declared=Verdict.XFAIL)]}),
        ("suites", "1 id stands for different cells (env differs): hopper/",
         {"results": [result(HELIX.model_copy(update={"env": (("A", "1"),)}))]}),
        ("suites", "1 id stands for different cells (env, serve differ): hopper/",
         {"results": [result(HELIX.model_copy(update={"env": (("A", "1"),), "serve": (("seed", 0),)}))]}),
        ("code", "different code of this repository: c in a; d in b", {"results": [result(OTHER)], "code": "d"}),
    ],
)  # fmt: skip
def test_mixes_that_mislead_are_refused_unless_told(tmp_path, merged, kind, says, second):
    first = run_of(tmp_path / "a", [result(HELIX)])
    other = run_of(tmp_path / "b", **second)
    status, _, told = merged(first, other)
    assert status == 2 and says in told and f"--allow {kind}" in told and not (tmp_path / "merged").exists()
    status, _, told = merged(first, other, allow=[kind])
    assert status in (0, 1) and f"allowed: {'1 name' if '1 name' in says else ''}" in told and says in told


def test_serve_options_in_another_order_are_the_same_cell(tmp_path, merged):
    """`--share-gpu` moved `enforce-eager` to the end once."""
    serve = (("enforce-eager", True), ("gpu-memory-utilization", 0.1))
    first = run_of(tmp_path / "a", [result(HELIX.model_copy(update={"serve": serve}))])
    second = run_of(tmp_path / "b", [result(HELIX.model_copy(update={"serve": serve[::-1]}))])
    status, run, told = merged(first, second)
    assert status == 0 and len(run.results) == 1 and "allowed" not in told


def test_a_merged_run_keeps_the_code_of_its_runs(tmp_path, merged):
    apart = [run_of(tmp_path / name, [result(cell)], code=name) for name, cell in (("c", HELIX), ("d", OTHER))]
    alone = []
    for run in apart:
        alone.append(tmp_path / f"{run.name}-alone")
        assert cli.main(["merge", str(run), "--into", str(alone[-1])]) == 0
    status, _, told = merged(*alone)
    assert status == 2 and "different code of this repository: c in c-alone; d in d-alone" in told
    assert merged(*alone, allow=["code"])[0] == 0
    assert cli.main(["merge", str(tmp_path / "merged"), str(apart[0]), "--into", str(tmp_path / "more")]) == 2


def test_a_run_that_was_continued_with_other_code_has_both(tmp_path, merged):
    first = run_of(tmp_path / "a", [result(HELIX)], code="c")
    run_of(first, [], [HELIX.id], code="lost before any result")
    run_of(first, [result(HELIX)], code="d")
    status, _, told = merged(first)
    assert status == 2 and "this repository: c in a; d in a (--allow code)" in told


def test_code_that_is_not_recorded_is_said_and_stays_so(tmp_path, merged, capsys):
    known, unknown = run_of(tmp_path / "a", [result(HELIX)]), run_of(tmp_path / "b", [result(OTHER)], code="")
    planned = run_of(tmp_path / "plan", [], [HELIX.id], code="")  # ran nothing
    status, _, told = merged(known, unknown, planned)
    assert status == 0 and "code not recorded in b\n" in told
    assert cli.main(["merge", str(tmp_path / "merged"), "--into", str(tmp_path / "more")]) == 0
    assert "code not recorded in a part of merged\n" in capsys.readouterr().out


def test_a_ledger_that_was_merged_before_codes_were_kept_is_said(merged):
    assert "code not recorded in 2026-11-26-h200\n" in merged(ROOT / "reports" / "2026-11-26-h200")[2]


def test_a_merged_run_is_not_resumed(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    monkeypatch.setattr(cli, "RUNS", runs)
    first = run_of(runs / "1", [result(HELIX)])
    assert cli.main(["merge", str(first), "--into", str(runs / "2-merged")]) == 0
    assert find_run("", runs) == first
    capsys.readouterr()
    assert cli.main(["--resume", "2-merged"], found=lambda: []) == 2
    assert f"--resume: {runs / '2-merged'} was made by merge" in capsys.readouterr().err
    (first / "ledger.ndjson").unlink()
    with pytest.raises(ValueError, match="there is no run in"):
        find_run("", runs)


def test_a_version_sweep_is_no_mix(tmp_path, merged):
    old = OTHER.model_copy(update={"vllm_version": "0.29.0"})
    first = run_of(tmp_path / "a", [result(HELIX)])
    second = run_of(tmp_path / "b", [result(old, versions=(("vllm", "0.29.0"), ("torch", "2.9.1")))])
    assert merged(first, second)[0] == 0


def test_hosts_may_have_taken_the_nightly_image_at_other_times(tmp_path, merged):
    hopper = OTHER.model_copy(update={"vllm_version": "nightly", "mode": Mode.STANDARD_DCP})
    blackwell = hopper.model_copy(update={"hardware": "blackwell"})
    first = run_of(tmp_path / "a", [result(hopper, versions=(("vllm", "0.33.0.dev1"),))])
    second = run_of(tmp_path / "b", [result(blackwell, versions=(("vllm", "0.33.0.dev2"),))])
    assert merged(first, second)[0] == 0


def test_local_suffixes_of_versions_are_no_mix(tmp_path, merged):
    cpu = result(
        BASE.model_copy(update={"hardware": "cpu"}), versions=(("vllm", "0.32.0+cpu"), ("torch", "2.13.0+cpu"))
    )
    assert merged(run_of(tmp_path / "a", [result(HELIX)]), run_of(tmp_path / "b", [cpu]))[0] == 0


def test_a_folder_of_runs_is_all_of_them_and_twice_is_once(tmp_path, merged):
    run_of(tmp_path / "nights" / "a", [result(BASE)])
    run_of(tmp_path / "nights" / "b", [result(HELIX)])
    _, run, told = merged(tmp_path / "nights", tmp_path / "nights" / "a")
    assert len(run.results) == 2 and told.count("merged a, b") == 1


def test_a_folder_without_a_run_and_a_used_folder_are_refused(tmp_path, merged):
    (tmp_path / "empty").mkdir()
    assert merged(tmp_path / "empty")[0] == 2
    first = run_of(tmp_path / "a", [result(BASE)])
    assert merged(first)[0] == 0 and merged(first)[0] == 2


def test_runs_that_call_themselves_alike_are_told_apart_by_folder(tmp_path, merged):
    first = run_of(tmp_path / "a", [result(HELIX)], name="run")
    second = run_of(tmp_path / "b", [result(OTHER)], [OTHER.id, BASE.id], name="run")
    status, _, told = merged(first, second)
    assert status == 3 and "merged a, b" in told and f"missing: {BASE.id} (planned by b)" in told
    found = json.loads((tmp_path / "merged" / "expected.json").read_text())
    assert found["runs"] == {str(first): "run", str(second): "run"}


def test_folders_that_are_called_alike_are_told_apart_by_path(tmp_path, merged):
    runs = [run_of(tmp_path / host / "out", [result(cell)]) for host, cell in (("x", HELIX), ("y", OTHER))]
    assert f"merged {runs[0]}, {runs[1]}" in merged(*runs)[2]


@pytest.mark.parametrize("text", ["", "no event\n[1]\n", '{"event": "run-end"}\n', '{"event": "models"}\n'])
def test_a_ledger_that_tells_of_no_run_is_nothing_to_merge(tmp_path, merged, text):
    empty = tmp_path / "runs" / "empty"
    empty.mkdir(parents=True)
    (empty / "ledger.ndjson").write_text(text)
    for given in (empty, empty.parent):
        status, _, told = merged(given)
        assert status == 2 and f"nothing to merge in {empty}: its ledger has neither a run-start nor a result" in told
    run_of(tmp_path / "runs" / "a", [result(HELIX)])  # a host that was lost at the start does not take the others along
    status, run, told = merged(empty.parent)
    assert status == 3 and verdicts(run) == {HELIX.id: "pass"} and f"warning: nothing to merge in {empty}" in told


def test_lines_that_cannot_be_read_are_warned_of_and_exit_3(tmp_path, merged):
    first = run_of(tmp_path / "a", [result(HELIX)])
    ledger = first / "ledger.ndjson"
    ledger.write_text(ledger.read_text() + "no event\n" + '{"event": "result", "result": {}}\n')
    status, run, told = merged(first)
    assert status == 3 and verdicts(run) == {HELIX.id: "pass"} and "report: " in told
    assert "warning: a: ledger.ndjson:4: not an event" in told and "2 lines could not be read" in told
    assert len(json.loads((tmp_path / "merged" / "expected.json").read_text())["unread"]["a"]) == 2


def test_a_run_start_of_other_types_is_read_as_far_as_it_goes(tmp_path, merged):
    (tmp_path / "a").mkdir()
    start = {"event": "run-start", "run": 1, "planned": 2, "hardware": "x", "setting": "y", "chosen": [3]}
    (tmp_path / "a" / "ledger.ndjson").write_text(json.dumps(start) + "\n")
    assert merged(tmp_path / "a")[0] == 0


@pytest.mark.parametrize(
    ("into", "why"),
    [("file", "it is a file"), ("file/below", "Not a directory"), ("/proc/x", "No such file or directory")],
)
def test_a_place_that_cannot_be_made_is_one_sentence(tmp_path, capsys, into, why):
    (tmp_path / "file").write_text("kept")
    run = run_of(tmp_path / "a", [result(HELIX)])
    assert cli.main(["merge", str(run), "--into", str(tmp_path / into)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"merge: error: cannot write into {tmp_path / into}: {why}; ") and told.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_what_ran_nowhere_is_said_of_all_runs(tmp_path, merged):
    other = OTHER.model_copy(update={"hardware": "blackwell"})
    skips = [result(cell, "skip", f"no {cell.hardware} here") for cell in (HELIX, OTHER, other)]
    status, run, told = merged(run_of(tmp_path / "a", skips), run_of(tmp_path / "b", [result(BASE)]))
    hopper = "skipped in a (no hopper here); not planned by b, which ran others on hopper"
    blackwell = "skipped in a (no blackwell here); no run ran a cell on blackwell"
    assert f"  2 cells ran nowhere: {hopper}\n  1 cell ran nowhere: {blackwell}\n" in told and status == 0
    assert {one.cell.id: one.reason for one in run.results if one.verdict == "skip"} == {
        HELIX.id: hopper, OTHER.id: hopper, other.id: blackwell,
    }  # fmt: skip


def test_a_cell_that_runs_skipped_although_they_had_its_hardware_keeps_their_reasons(tmp_path, merged):
    first = run_of(tmp_path / "a", [result(BASE), result(HELIX, "skip", "needs 4")])
    second = run_of(tmp_path / "b", [result(BASE), result(HELIX, "skip", "no hopper here")])
    assert "1 cell ran nowhere: skipped in a (needs 4); skipped in b (no hopper here)\n" in merged(first, second)[2]


def test_the_committed_cpu_and_h200_runs_are_one_matrix_with_both_columns(tmp_path, merged):
    """They were asked for other suites, which has to be allowed."""
    runs = [ROOT / "reports" / name for name in ("2026-11-26-cpu", "2026-11-26-h200")]
    status, _, told = merged(*runs)
    assert status == 2 and "asked for different cells" in told and "for different cells (" not in told
    status, run, _ = merged(*runs, allow=["suites"])
    assert status == 1  # as that of the H200 run
    judged = {one.cell.hardware for one in run.results if one.verdict not in ("skip", "error")}
    assert judged == {"cpu", "hopper"}
    summary = (tmp_path / "merged" / "summary.md").read_text().splitlines()
    heads = next(line for line in summary if line.startswith("| GQA backend")).split("|")
    column = next(place for place, head in enumerate(heads) if "hopper: Standard TP" in head)
    row = next(line for line in summary if line.startswith(r"| FLASH\_ATTN |")).split("|")
    assert "pass" in row[column] and "cpu: Helix" in "|".join(heads)


def test_the_readme_s_matrix_is_that_of_the_committed_runs(merged):
    """Its command, and what that counts."""
    readme = (ROOT / "README.md").read_text()
    command = readme[readme.index("./test_helix.sh merge reports/") :].split("--into DIR")[0].replace("\\", " ").split()
    folders = [word for word in command if word.startswith("reports/")]
    _, run, _ = merged(*(ROOT / folder for folder in folders), allow=["suites", "code"])
    counts = defaultdict(Counter)
    for one in run.results:
        if one.verdict is not Verdict.SKIP and not one.cell.fault:
            mode = "helix" if one.cell.mode.helix else str(one.cell.mode)
            counts[one.cell.backend, one.cell.hardware, mode][str(one.verdict)] += 1
    names = {"pass": "✓", "rejected": "refused"}
    order = ("pass", "xfail", "fail", "rejected", "error")

    def said(*key: str) -> str:
        return ", ".join(
            f"{names.get(verdict, verdict)} {counts[key][verdict]}" for verdict in order if counts[key][verdict]
        )

    for backend, hardware in {key[:2] for key in counts}:
        cells = [said(backend, hardware, mode) for mode in ("standard-tp", "standard-dcp", "helix")]
        line = " | ".join([backend, {"cpu": "CPU", "hopper": "Hopper"}[hardware], *cells])
        assert f"| {line} |".replace("|  |", "| |").replace("|  |", "| |") in readme, line

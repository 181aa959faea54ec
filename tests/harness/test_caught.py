"""The table of deliberate defects: what a run's rows say, and what the exit status is."""

from dataclasses import replace

import pytest

from harness.cell import Cell, Mode
from harness.cli import main
from harness.ledger import Ledger
from harness.oracle.caught import DEATH, PROOF, markdown, row, table
from harness.result import CellResult, Statistic
from harness.verdict import Verdict

CELL = Cell(
    mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=2, kvp=2, comm="a2a",
    fault="drop-shard:layer=1",
)  # fmt: skip
CHANGE = Statistic(name="decode: largest logprob change", value=3.0, bound=1e-4, n=9, unit="nat")
LOUD = Statistic(name="decode: loudness against the null", value=40.0, bound=2.0, n=9, unit="times")
FINE = Statistic(name="prefill: largest logprob change", value=5e-5, bound=1e-4, n=9, unit="nat")
MISSING = Statistic(name="missing answers", value=2, bound=0, n=2, unit="prompts")


def result(verdict=Verdict.FAIL, statistics=(FINE, LOUD, CHANGE), declared=Verdict.FAIL, **cell) -> CellResult:
    return CellResult(
        cell=CELL.model_copy(update=cell), suites=("faults",), declared=declared, declared_why="why", verdict=verdict,
        reason="because", statistics=statistics, band="a band",
    )  # fmt: skip


def test_a_row_names_the_statistic_that_is_furthest_beyond_its_bound():
    made = row(result())
    assert (made.statistic, made.value, made.bound) == (CHANGE.name, 3.0, 1e-4)
    assert made.effect == pytest.approx(30_000)
    assert made.caught and made.beyond == (LOUD.name, CHANGE.name)


def test_a_kl_counts_by_its_root():
    kl = Statistic(name="decode: largest KL of the top tokens", value=4.0, bound=1e-8, n=9, unit="nat")
    made = row(result(statistics=(kl, CHANGE)))  # root of 4e8 is 20,000, less than 30,000
    assert made.statistic == CHANGE.name
    assert row(result(statistics=(kl,))).effect == pytest.approx(20_000)


def test_how_far_a_defect_is_over_the_point_of_a_clean_cell():
    """Prefill 5e-5 over 4e-5 is 1.25; decode 3 over 6e-5 is 50,000. Only largest changes with a null count."""
    fine, change = replace(FINE, null=4e-5), replace(CHANGE, null=6e-5)
    assert row(result(statistics=(fine, replace(LOUD, null=1e-9)))).over_point == pytest.approx(1.25)
    assert row(result(statistics=(fine, change))).over_point == pytest.approx(50_000)
    assert row(result()).over_point is None


def test_the_page_counts_what_is_over_the_point(tmp_path):
    quiet, loud = replace(FINE, null=1e-4), replace(FINE, null=4e-5)
    made = table([run_of(
        tmp_path / "a", result(statistics=(loud, CHANGE)), result(Verdict.PASS, (loud,), fault="swap-chunks"),
        result(Verdict.PASS, (quiet,), fault="lse-last-bit"),
    )])  # fmt: skip
    assert "2 of the 3 cells whose run told the null's 99.9 % point change some output" in markdown(made)
    assert "by more than that; 1 of these are caught" in markdown(made)


def test_a_missing_answer_has_no_effect_size():
    made = row(result(statistics=(MISSING,)))
    assert (made.statistic, made.value, made.effect) == (MISSING.name, 2, None)
    assert row(result(statistics=(MISSING, CHANGE))).statistic == CHANGE.name


def test_a_fallback_is_caught_by_its_proof():
    made = row(result(Verdict.UNPROVEN, (FINE,)))
    assert made.caught and made.statistic == PROOF


def test_a_cell_that_fails_without_a_comparison_is_caught_by_its_death():
    made = row(result(statistics=()))
    assert made.caught and made.statistic == DEATH and made.over_point is None


def test_where_it_is_declared_xfail_a_statistic_beyond_its_bound_has_caught_it():
    assert row(result(Verdict.XFAIL, declared=Verdict.XFAIL)).caught
    assert not row(result(Verdict.XFAIL, (FINE,), declared=Verdict.XFAIL)).caught


def run_of(folder, *made: CellResult):
    ledger = Ledger(folder)
    for item in made:
        ledger.result(item)
    return folder


def test_the_table_counts_clean_cells_apart_and_takes_the_last_run(tmp_path):
    first = run_of(tmp_path / "a", result(Verdict.PASS, (FINE,)), result(Verdict.PASS, (FINE,), fault=None))
    second = run_of(tmp_path / "b", result())
    made = table([first, second])
    assert [item.caught for item in made.rows] == [True]
    assert (made.clean, made.alarms, made.bands) == (1, 0, ("a band",))


def test_the_command_tells_what_was_not_caught(tmp_path, capsys):
    missed = run_of(tmp_path / "a", result(Verdict.PASS, (FINE,)), result(fault="swap-chunks"))
    assert main(["faults", str(missed), "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().out
    assert "1 caught, 1 not" in said and "**not caught** (pass)" in said
    assert said.index("drop-shard:layer=1") < said.index("swap-chunks")
    assert "`swap-chunks`: The first two ranks of each group get each other's heads" in said
    assert (tmp_path / "out.json").read_text().count('"fault"') == 2
    excused = run_of(tmp_path / "b", result(Verdict.PASS, (FINE,), declared=Verdict.PASS))
    assert main(["faults", str(excused)]) == 0
    assert "drop-shard:layer=1`, helix-gqa TP2/DCP2 i1 a2a: why" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["faults", str(tmp_path / "none")])

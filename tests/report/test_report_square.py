"""The rule by which cells make a square, and what the matrix holds."""

import examples
import pytest
from examples import cell, result

from harness import report
from harness.report.square import kind_of, latent_models, matrices, square
from harness.verdict import Verdict


def together(*pairs):
    """The square of cells with these (verdict, declared) pairs."""
    found = [
        result(cell("helix-gqa", "FLASH_ATTN", "hopper", f"m{n}", 4, 2), verdict, "because", declared=declared)
        for n, (verdict, declared) in enumerate(pairs)
    ]
    return square("GQA", "FLASH_ATTN", "hopper", "Helix", found)


def test_a_declared_refusal_does_not_hide_five_passes():
    found = together(*[("pass", "pass")] * 5, ("rejected", "rejected"))
    assert (found.verdict, found.declared, found.disagrees) == (Verdict.PASS, Verdict.PASS, False)
    assert found.note == "6 cells: 5 pass, 1 rejected"


def test_one_fail_among_many_is_a_fail_and_comes_first():
    found = together(("pass", "pass"), ("fail", "pass"), ("skip", "pass"))
    assert (found.verdict, found.disagrees) == (Verdict.FAIL, True)
    assert "/m1/" in found.cells[0]
    assert found.standing == "≠ declared pass"


def test_an_error_hides_no_pass_and_is_counted_and_listed_first():
    """As in the committed CPU run: 12 pass, 1 error, 8 refused as declared."""
    found = together(*[("pass", "pass")] * 12, ("error", "pass"), *[("rejected", "rejected")] * 8)
    assert (found.verdict, found.disagrees) == (Verdict.PASS, False)
    assert found.note == "21 cells: 12 pass, 1 error, 8 rejected"
    assert "/m12/" in found.cells[0]


@pytest.mark.parametrize(
    ("pairs", "verdict", "declared", "disagrees"),
    [
        ([("rejected", "rejected"), ("rejected", "pass")], "rejected", "pass", True),
        ([("rejected", "rejected")], "rejected", "rejected", False),
        ([("xpass", "xfail"), ("unproven", "pass")], "unproven", "pass", True),
        ([("xpass", "xfail"), ("pass", "pass")], "xpass", "xfail", True),
        ([("fail", "rejected"), ("pass", "pass")], "fail", "rejected", True),
        ([("error", "pass"), ("pass", "pass"), ("rejected", "rejected")], "pass", "pass", False),
        ([("error", "pass"), ("rejected", "rejected")], "error", "pass", False),
        ([("error", "pass"), ("xfail", "xfail")], "xfail", "xfail", False),
        ([("error", "pass"), ("skip", "pass")], "error", "pass", False),
        ([("error", "pass"), ("flaky", "pass")], "flaky", "pass", True),
        ([("xfail", "xfail"), ("pass", "pass")], "xfail", "xfail", False),
        ([("skip", "pass"), ("rejected", "rejected")], "rejected", "rejected", False),
        ([("skip", "pass"), ("stale", "pass")], "stale", "pass", False),
        ([("skip", "pass")], "skip", "pass", False),
    ],
)
def test_worst_first(pairs, verdict, declared, disagrees):
    found = together(*pairs)
    assert (found.verdict, found.declared, found.disagrees) == (verdict, declared, disagrees)


def test_kinds_come_from_mode_backend_other_cells_and_name():
    auto = cell("standard-tp", "auto", "hopper", "acme/latent-7b", 8)
    assert kind_of(auto) == "GQA"
    assert kind_of(auto, latent_models([cell("helix-mla", "auto", "hopper", "acme/latent-7b", 8, 8)])) == "MLA"
    assert kind_of(cell("standard-dcp", "CUTLASS_MLA", "blackwell", "x", 8, 8)) == "MLA"
    assert kind_of(cell("standard-tp", "auto", "hopper", examples.LITE, 8)) == "MLA"
    assert kind_of(cell("helix-gqa", "HELIX_CPU", "cpu", "x", 4, 2)) == "GQA"


def test_every_cell_without_a_planted_defect_is_behind_one_square(run_dir):
    results = {one.cell.id: one for one in examples.results()}
    found = [cell_id for m in matrices(report.frame(run_dir), results) for s in m.squares for cell_id in s.cells]
    assert sorted(found) == sorted(cell_id for cell_id, one in results.items() if not one.cell.fault)


def test_hardware_that_ran_comes_first(run_dir):
    results = {one.cell.id: one for one in examples.results()}
    gqa, mla = matrices(report.frame(run_dir), results)
    assert gqa.hardware == ("cpu", "hopper", "blackwell")
    assert mla.hardware == ("cpu", "hopper", "blackwell", "blackwell-rtx")

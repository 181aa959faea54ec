"""Fits: known constants come back, what is left out lies in the band, and unreadable rows are told."""

import json
import math

import numpy as np
import pytest

from benchmarks.planner import steps
from helix_runtime import capabilities
from helix_runtime.planner.calibration import (
    ASSUMED_BAND,
    CARRIED_BAND,
    FOLDER,
    calibrate,
    fit,
    fitted,
    left_out_errors,
)
from helix_runtime.planner.measurements import Measurement, read_measurements


def made(kind="attention", efficiency=0.5, overhead=3e-6, per_rank=0.0, noise=0.0, n=20, device="h200", series=""):
    random = np.random.default_rng(7)
    rooflines = np.geomspace(1e-6, 1e-3, n)
    ranks = [2 ** (at % 4) for at in range(n)]
    return [
        Measurement(
            kind,
            series,
            f"case {at}",
            float(roofline),
            float((overhead + per_rank * rank + roofline / efficiency) * math.exp(noise * random.standard_normal())),
            device,
            "made.json",
            rank,
        )
        for at, (roofline, rank) in enumerate(zip(rooflines, ranks, strict=True))
    ]


def test_known_constants_come_back():
    found = fit(made(per_rank=2e-7))
    assert found.efficiency == pytest.approx(0.5) and found.overhead == pytest.approx(3e-6)
    assert found.per_rank == pytest.approx(2e-7)
    assert found.predict(1e-5, 8) == pytest.approx(3e-6 + 8 * 2e-7 + 2e-5)


def test_no_constant_is_negative():
    """Times below a straight line through zero would want a negative overhead."""
    found = fit([Measurement("weights", "", "", r, 2 * r - 1e-7, "h200", "f") for r in (1e-6, 2e-6, 5e-6, 1e-5)])
    assert found.overhead == 0 and found.per_rank == 0 and 0.5 < found.efficiency < 0.55


def test_left_out_measurements_lie_in_the_band():
    """Nine of ten of those that fitted the band, and of fresh ones from the same machine."""
    measured = made(noise=0.1, n=60)
    found = fitted(measured)
    assert 0.1 < found.band < 0.3
    errors = np.abs(left_out_errors(measured))
    assert (errors <= found.band).mean() >= 0.9
    fresh = made(noise=0.1, n=300)
    inside = [abs(math.log(found.predict(one.roofline, one.ranks) / one.seconds)) <= found.band for one in fresh]
    assert np.mean(inside) > 0.85


def test_a_case_that_was_measured_twice_does_not_foretell_itself():
    """Two kernels that do not follow one line, each case in two files: its twin would predict each of them exactly."""
    cases = [("a", 1e-6, 3e-6), ("b", 4e-6, 9e-6), ("c", 1e-5, 6e-5), ("d", 2e-5, 3e-5)]
    twice = [Measurement("pack", "vllm", case, r, s, "h200", file) for case, r, s in cases for file in ("1", "2")]
    once = [one for one in twice if one.source == "1"]
    assert sorted(left_out_errors(twice)) == pytest.approx(sorted(left_out_errors(once) * 2))
    assert fitted(twice).band == pytest.approx(fitted(once).band)


def by_class() -> list[tuple[str, str | None]]:
    """Every class, and every backend of attention, that the committed measurements calibrate."""
    found = read_measurements(FOLDER).measurements
    listed: list[tuple[str, str | None]] = [("pack", None), ("combine", None), ("weights", None), ("launch", None)]
    known = {(one.kind, one.series) for one in found if one.series in capabilities.backends()}
    return listed + sorted(pair for pair in known if pair[0].endswith("attention"))


@pytest.mark.parametrize("kind, backend", by_class())
def test_whole_cases_that_are_left_out_lie_in_the_band(kind, backend):
    """Of the committed measurements, class by class: nine of ten, predicted by the other cases alone."""
    series = backend or {"pack": "vllm", "combine": "vllm", "launch": "empty"}.get(kind)
    own = [
        one
        for one in read_measurements(FOLDER).measurements
        if one.kind == kind and series in (None, one.series) and one.device == "h200"
    ]
    band, inside = calibrate("h200", backend)[kind].band, []
    for case in {one.case for one in own}:
        others = fit([one for one in own if one.case != case])
        inside += [
            abs(math.log(others.predict(one.roofline, one.ranks) / one.seconds)) <= band * 1.000001
            for one in own
            if one.case == case
        ]
    assert len(inside) == calibrate("h200", backend)[kind].n >= 8
    assert np.mean(inside) >= 0.9


def test_one_wild_measurement_widens_the_band():
    measured = made(n=8)
    twice = [
        *measured[:4],
        *(Measurement(*{**one.__dict__, "seconds": one.seconds * 2}.values()) for one in measured[4:]),
    ]
    assert fitted(twice).band > fitted(measured).band


def test_four_measurements_make_a_fit_and_three_do_not():
    with pytest.raises(ValueError, match="3 measurements; a fit needs 4"):
        fitted(made(n=3))
    assert not calibrate("h200", given=made(n=3))["attention"].measured
    assert calibrate("h200", given=made(n=4))["attention"].measured


def test_another_gpus_fit_is_carried_over_with_a_wider_band():
    measured = made(noise=0.05)
    own, carried = calibrate("h200", given=measured)["attention"], calibrate("gb200", given=measured)["attention"]
    assert carried.efficiency == own.efficiency and carried.band == pytest.approx(own.band + CARRIED_BAND)
    assert "carried over from h200" in carried.source


def test_attention_of_the_asked_backend_is_preferred():
    measured = made(series="FLASH_ATTN") + made(series="TRITON_MLA", efficiency=0.2)
    assert calibrate("h200", "TRITON_MLA", given=measured)["attention"].efficiency == pytest.approx(0.2)
    assert calibrate("h200", "FLASH_ATTN", given=measured)["attention"].efficiency == pytest.approx(0.5)
    unmeasured = calibrate("h200", "FLASHINFER", given=measured)["attention"]
    assert unmeasured.efficiency == pytest.approx(0.2), "what nobody measured is not preferred"
    measured_one = calibrate("h200", "TRITON_MLA", given=measured)["attention"]
    assert unmeasured.band == pytest.approx(measured_one.band + CARRIED_BAND)
    assert unmeasured.source.endswith("carried over from TRITON_MLA")
    ours = made(series="no backend of vLLM", efficiency=0.9)
    assert calibrate("h200", given=measured + ours)["attention"] == calibrate("h200", given=measured)["attention"]


def test_what_was_not_measured_is_assumed_with_a_wide_band(tmp_path):
    found = calibrate("h200", folder=tmp_path)
    assert found.measured == () and found["attention"].band == ASSUMED_BAND
    copies = made("stream", efficiency=0.8, series="copy_driver")
    assert calibrate("h200", given=copies)["weights"].efficiency == pytest.approx(0.8)
    assert not calibrate("h200", given=copies)["weights"].measured


def test_rows_are_read_generically(tmp_path):
    rows = [
        {"operation": "attention_decode", "bytes": 4.8e6, "us": {"FLASH_ATTN": [2.0, 1.9, 2.1], "empty": 0.9}},
        {"operation": "gemm", "bytes": 1, "flops": 989.5e9, "dtype": "bf16", "us": 2000},
        {"operation": "all_reduce", "bytes": 450e3, "ranks": 8, "us": [5.0, 4.0, 6.0]},
        {"operation": "pack", "case": "N16 B8 H2", "bytes": 48, "us": {"vllm": 3.0, "copy_driver": 1.0}},
        {"operation": "juggle", "bytes": 1, "us": 1},
        {"operation": "gemm", "us": 1},
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": rows}))
    (tmp_path / "b.json").write_text(json.dumps({"device": "Abacus", "rows": rows}))
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[1]")
    found = read_measurements(tmp_path)
    seen = {(one.kind, one.series): one for one in found.measurements}
    assert seen["attention", "FLASH_ATTN"].roofline == pytest.approx(1e-6)
    assert seen["attention", "FLASH_ATTN"].seconds == pytest.approx(2e-6)
    assert seen["launch", "empty"].seconds == pytest.approx(0.9e-6)
    assert seen["weights", ""].roofline == pytest.approx(1e-3), "bound by arithmetic"
    assert seen["all-reduce", ""].roofline == pytest.approx(1e-6) and seen["all-reduce", ""].ranks == 8
    assert seen["pack", "vllm"].ranks == 16 and seen["stream", "copy_driver"].kind == "stream"
    left = " ".join(found.left_out)
    assert "unknown device" in left and "no JSON" in left and "juggle" in left and "row 5: KeyError: 'bytes'" in left
    assert len(found.left_out) == 5


def test_measured_layers_lie_in_their_band():
    """Whole layers of one rank on an H200, 8B to 671B: nine of ten inside the band, and none off by a third.

    Their GEMMs, timed alone, are what weights are fitted to; attention and the exchange come from other files.
    """
    found = steps(FOLDER / "results" / "step-h200.json")
    assert len(found) >= 20
    assert sum(one.inside for one in found) >= 0.9 * len(found)
    assert all(0.75 < one.predicted / one.measured < 1.33 for one in found)


def test_the_committed_measurements_calibrate_an_h200():
    found = calibrate("h200")
    assert {"stream", "pack", "combine", "launch"} <= set(found.measured)
    assert 0.6 < found["stream"].efficiency < 1 and 0.5e-6 < found["launch"].overhead < 2e-6


@pytest.mark.parametrize(("ranks", "measured"), [((2,), False), ((2, 4), True)])
def test_a_collective_is_fitted_only_where_several_numbers_of_ranks_were_measured(ranks, measured):
    given = [
        Measurement("all-to-all", "", f"{n} {size}", size, 3 * size + 1e-6 * n, "h200", "f", n)
        for n in ranks for size in (1e-6, 2e-6, 5e-6, 1e-5)
    ]  # fmt: skip
    assert calibrate("h200", given=given)["all-to-all"].measured is measured
    other = Measurement("all-to-all", "", "8", 1e-6, 1e-5, "h100", "g", 8)
    found = calibrate("h200", given=[*given, other])["all-to-all"]
    assert found.n == (8 if measured else 5), "with one number of ranks here, what others measured counts too"

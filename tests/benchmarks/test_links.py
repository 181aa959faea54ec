"""The fit of links, on times that were made by the model itself."""

import json
import math

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

from benchmarks import links
from benchmarks.cases import Case
from benchmarks.exchange import BATCHES, SIZES
from helix_runtime.planner.calibration import calibrate
from helix_runtime.planner.measurements import read_measurements

RATES = {"all_to_all": 300e9, "all_gather": 350e9, "all_reduce": 250e9}


def made(ranks: int, noise: float = 0.0, device: str = "NVIDIA H200", large: float = 0.0) -> dict:
    """A results file whose collectives take 5 µs + 1.5 µs a doubling + bytes / rate, and its exchanges 7 µs more;
    `large`: an All-to-All of more than 16 KB to a peer so much more."""
    rows = []
    for number, (heads, head_dim) in enumerate(SIZES):
        for batch in BATCHES:
            case = Case(ranks, batch, heads, head_dim)
            sent = (ranks - 1) * case.layout.chunk_bytes
            params = {"ranks": ranks, "batch": batch, "heads": heads, "head_dim": head_dim}
            for name, rate in RATES.items():
                us = (5 + 1.5 * math.log2(ranks) + sent / rate * 1e6) * (1 + noise * (-1) ** (number + batch))
                us += large if name == "all_to_all" and case.layout.chunk_bytes > 16384 else 0
                row = {"operation": name, "case": case.name, "params": params, "bytes": sent, "flops": 0}
                rows.append(row | {"ranks": ranks, "us": {"nccl": [us, us, us]}})
            whole = 12 + 1.5 * math.log2(ranks) + sent / RATES["all_to_all"] * 1e6
            row = {"operation": "exchange", "case": case.name, "params": params, "bytes": sent, "flops": 0}
            rows.append(row | {"ranks": ranks, "us": {"packed": [whole, whole, whole]}})
    return {"benchmark": "exchange", "device": device, "rows": rows}


@pytest.fixture
def files(tmp_path):
    def write(*documents: dict) -> list:
        paths = []
        for document in documents:
            paths.append(tmp_path / f"exchange-{len(paths)}.json")
            paths[-1].write_text(json.dumps(document))
        return paths

    return write


def test_the_fit_finds_what_made_the_times(files):
    found = links.report(*links.read(files(made(2), made(4), made(8))))
    assert (found["gpu"], found["ranks"]) == ("h200", [2, 4, 8])
    each = found["collectives"]
    assert all(
        (one["latency_us"], one["latency_us_per_doubling"], one["large_us"]) == (5, 1.5, 0) for one in each.values()
    )
    rates = {kind: one["rate_gbps"] for kind, one in each.items()}
    assert rates == {"all-to-all": 300.0, "all-gather": 350.0, "all-reduce": 250.0}
    assert each["all-to-all"]["efficiency"] == round(300 / 450, 3)
    assert all(one["unseen_sizes"]["off"] < 1e-6 and one["unseen_sizes"]["n"] == 48 for one in each.values())


def test_what_large_messages_wait_is_found_and_is_the_all_to_alls_alone(files):
    found = links.report(*links.read(files(made(2, large=4.0), made(4, large=4.0))))["collectives"]
    assert {kind: one["large_us"] for kind, one in found.items()} == {"all-to-all": 4, "all-gather": 0, "all-reduce": 0}
    assert found["all-to-all"]["rate_gbps"] == 300 and found["all-to-all"]["unseen_sizes"]["off"] < 1e-6


def test_noise_is_told_and_not_hidden(files):
    found = links.report(*links.read(files(made(2, 0.1), made(8, 0.1))))
    each = found["collectives"].values()
    assert all(one["latency_us"] == pytest.approx(5, rel=0.25) for one in each)
    assert all(0.08 < one["unseen_sizes"]["off"] < 0.2 for one in each)


def test_one_number_of_ranks_leaves_the_planners_growth(files):
    found = links.report(*links.read(files(made(2))))
    one = found["collectives"]["all-reduce"]
    assert one["per_doubling_is_the_planners"] and one["latency_us_per_doubling"] == 1.1
    assert one["latency_us"] == pytest.approx(5 + 1.5 - 1.1, abs=0.01)


def test_whole_exchanges_are_compared_with_the_planners_own_terms(files):
    """Pack and combine as measured on the H200 take some microseconds; the made ones take 7."""
    found = links.report(*links.read(files(made(2), made(4), made(8))))
    packed = found["whole_exchanges"]["packed"]
    assert packed["n"] == 48 and 0.8 < packed["median"] < 1.6


def test_files_of_two_machines_or_of_none_are_refused(files):
    with pytest.raises(ValueError, match="must name one GPU"):
        links.read(files(made(2), made(4, device="NVIDIA H100 80GB HBM3")))
    with pytest.raises(ValueError, match="must name one GPU"):
        links.read(files(made(2, device="cpu")))


def test_times_that_do_not_grow_with_the_bytes_are_refused(files):
    document = made(2)
    for row in document["rows"]:
        row["us"] = {name: [1e3 / row["bytes"]] * 3 for name in row["us"]}
    with pytest.raises(ValueError, match="do not grow"):
        links.report(*links.read(files(document)))


def test_the_planner_reads_the_collectives_of_such_a_file_and_skips_whole_exchanges(files, tmp_path):
    files(made(8))
    found = read_measurements(tmp_path)
    assert found.left_out == ()
    assert {one.kind for one in found.measurements} == {"all-to-all", "all-gather", "all-reduce"}
    assert len(found.measurements) == 48
    assert {one.kind for one in found.measurements if one.large} == {"all-to-all"}


def test_the_planner_holds_what_the_committed_exchanges_say():
    """Latencies in hardware.json are the fit's; nine of ten sizes are told by the others to 9 % and 18 %."""
    found = links.report(*links.read(sorted(links.FOLDER.glob("exchange-*.json"))))["collectives"]
    for kind, off in (("all-to-all", 0.09), ("all-gather", 0.18)):
        one = found[kind]
        fitted = {
            "latency": one["latency_us"],
            "per_doubling": one["latency_us_per_doubling"],
            "large": one["large_us"],
        }
        assert one["planner_has_us"] == pytest.approx(fitted, abs=0.01)
        assert one["unseen_sizes"]["off"] <= off
        assert calibrate("h200")[kind].efficiency == pytest.approx(one["efficiency"], abs=1e-3)
    assert not calibrate("h200")["all-reduce"].measured

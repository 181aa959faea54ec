"""What `benchmarks.overlap` measures and prints; its figures need a GPU."""

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

import torch

from benchmarks import overlap, overlap_fit, overlap_table
from benchmarks.attention_cases import Attention
from benchmarks.records import Record, Results
from helix_runtime.attention.split_kv import COUNTED_LAUNCH, COUNTED_PROGRAMS
from helix_runtime.overlap import WAYS, OverlapCosts, Way

LARGE = Attention(64, 128 << 10, 8, 1)
LINK = {
    "exchange_programs": 2, "exchange_threads": 1024, "exchange_link_gbps": 25.0, "exchange_rate_gbps": 50.0,
    "exchange_share": 0.5,
}  # fmt: skip


def measured(path, times, attention=1000.0, exchange=500.0):
    """Results of one size: (cut, Way or None, micro-batches) -> microseconds."""
    results = Results("overlap", "command", "GPU", {}, path)
    for (name, way, count), us in times.items():
        params = {"batch": 64, "micro_batches": count, "exchange_bytes": 50_000_000, "way": way, **LINK}
        extra = {"case": LARGE.name, "cut": name, "attention_us": attention, "exchange_us": exchange}
        extra["hidden"] = (1500 - us) / exchange
        results.add(Record("overlap/step", params, 1, 1, us, us, us, extra))
    results.add(Record("overlap/attention", {"splits": 16}, 1, 1, 900.0, 900.0, 900.0, {"case": LARGE.name}))
    return results


TIMES = {
    ("1", (1, 0, False), 1): 1500.0,
    ("2", (2, 0, False), 2): 1300.0,
    ("8 room", None, 8): 1200.0,
    ("flags 5", (5, 0, True), 5): 1120.0,
    ("flags 16, more splits", None, 16): 1100.0,
}


def test_cuts_have_names_and_the_rule_knows_those_it_takes():
    flags = overlap.Cut(16, 3, programs=COUNTED_PROGRAMS, launch=COUNTED_LAUNCH)
    assert flags.name(LARGE) == "flags 16 halved 3x, 64 splits of 8 warps"
    assert flags.splits(Attention(8, 16 << 10, 8, 1)) == 64  # of 256 keys each
    assert flags.way == Way(16, 3, once=True)
    assert overlap.Cut(16, 3, programs=2 * COUNTED_PROGRAMS, launch=COUNTED_LAUNCH).way is None
    room = overlap.Cut(8, room=True)
    assert (room.name(LARGE), room.way) == ("8 room", None)
    assert overlap.Cut(2).way == Way(2)


def test_every_size_has_the_rules_ways_and_five_micro_batches():
    assert {Way(), *WAYS, Way(8, 3, True), Way(16, 3, True), Way(24, 3, True)} <= {cut.way for cut in overlap.CUTS}


def test_the_table_takes_the_best_cut_and_leaves_out_the_attention_alone(tmp_path):
    lines = overlap_table.table(measured(tmp_path / "r.json", TIMES)).splitlines()
    assert len(lines) == 3
    assert "| 2 x 512 threads, 50 GB/s, 25.0 MB, 0.5 of the attention | 1000.0 | 500.0 | 1500.0 |" in lines[-1]
    assert "| flags 16, more splits | 1100.0 | 0.80 | 16, -26.7% | 1, +0.0% |" in lines[-1]


def test_results_of_attentions_for_each_micro_batch_can_still_be_printed(tmp_path):
    results = measured(tmp_path / "r.json", {key: us for key, us in TIMES.items() if "flags" not in key[0]})
    for record in results.records:
        for name in ("way", "exchange_link_gbps", "exchange_rate_gbps"):
            record.params.pop(name, None)
        record.params["room"] = "room" in record.extra.get("cut", "")
    assert "| 2 x 512 threads, no link, 25.0 MB, 0.5 of the attention |" in overlap_table.table(results)
    assert overlap_table.table(results).endswith("| 8 room | 1200.0 | 0.60 | 8, -20.0% | 1, +0.0% |")


def test_the_fit_never_chooses_what_was_slower(tmp_path):
    good = overlap_table.groups(measured(tmp_path / "a.json", TIMES))
    bad = overlap_table.groups(
        measured(tmp_path / "b.json", {key: us * 1.3 if key[2] > 1 else us for key, us in TIMES.items()})
    )
    assert overlap_fit.fitted(good).changes == [pytest.approx(1300 / 1500 - 1)]
    assert overlap_fit.fitted(bad).changes == [0.0]
    slow = measured(
        tmp_path / "c.json", {key: us * 2 if key[2] > 1 else us for key, us in TIMES.items()}, exchange=60.0
    )
    assert overlap_fit.fitted(overlap_table.groups(slow)).changes == [0.0]
    assert isinstance(overlap_fit.fitted(good).costs, OverlapCosts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", [(2, 512, 50.0), (8, 128, 50.0), (32, 128, 50.0)])
@pytest.mark.parametrize("words", [16, 4096, (1 << 20) - 48])
def test_a_copy_at_a_rate_copies_all_and_is_not_faster_than_its_link(words, how):
    source = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    copy = overlap.Copy(*how)
    took = []
    for _ in range(5):
        target = torch.full_like(source, -1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        copy(target[:words], source[:words])
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) * 1e3)
        assert torch.equal(target[:words], source[:words]) and (target[words:] == -1).all()
    link_us = 4 * words / copy.rate / 1e3
    assert min(took) >= 0.98 * link_us - 1  # a clock may tick once in a microsecond

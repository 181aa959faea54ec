"""What `benchmarks.overlap` measures and prints; its figures need a GPU."""

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

from benchmarks import overlap
from benchmarks.attention_cases import Attention
from benchmarks.records import Record, Results


def test_the_runs_of_an_attention_with_flags_fill_the_gpu_so_many_times():
    """Three programs on each of 132 multiprocessors: 396 places."""
    large = Attention(64, 128 << 10, 8, 1)
    assert [overlap.flag_splits(large, waves) for waves in (2, 4, 8, 16)] == [16, 32, 64, 128]
    assert overlap.flag_splits(Attention(8, 16 << 10, 8, 1), 16) == 64  # of at least 256 keys each
    assert overlap.Cut(16, 3, waves=8).name(large) == "flags 16 halved 3x, 64 splits"
    assert overlap.Cut(8, room=True).name(large) == "8 room"


def test_the_table_takes_the_best_cut_and_leaves_out_the_attention_alone(tmp_path):
    results = Results("overlap", "command", "GPU", {}, tmp_path / "r.json")
    params = {"batch": 64, "exchange_programs": 2, "exchange_share": 0.5, "exchange_bytes": 92_000_000}
    for name, count, us in (("1", 1, 1500.0), ("2", 2, 1300.0), ("5", 5, 1350.0), ("8", 8, 1200.0),
                            ("flags 16, 64 splits", 16, 1100.0)):  # fmt: skip
        extra = {"case": "B64", "cut": name, "attention_us": 1000.0, "exchange_us": 500.0, "hidden": (1500 - us) / 500}
        results.add(Record("overlap/step", params | {"micro_batches": count}, 1, 1, us, us, us, extra))
    results.add(Record("overlap/attention", {"splits": 16}, 1, 1, 900.0, 900.0, 900.0, {"case": "B64"}))
    lines = overlap.table(results).splitlines()
    assert len(lines) == 3
    assert "| flags 16, 64 splits | 1100.0 | 0.80 | 16, -26.7% | 8, -20.0% |" in lines[-1]

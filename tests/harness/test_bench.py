"""Bench cells without servers: what a suite may ask, the order of rounds, resuming, intervals, and verdicts."""

import json
import math
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest

from harness.bench import cells as bench_cells
from harness.bench import measure as measuring
from harness.bench.judge import gather, judge, statistics
from harness.bench.load import LoadFailed, arguments
from harness.bench.measure import BASELINE, CELL, Sides, Where, cache_labels, finished, measure, slots, undisturbed
from harness.bench.predict import predict
from harness.bench.result import KvCapacity, interval, ratio
from harness.bench.spec import BenchSpec, Goodput, Load
from harness.capacity import promised
from harness.cell import Cell, Mode
from harness.declared import shape_of
from harness.hardware import Hardware
from harness.lease import Host
from harness.matrix import expand
from harness.need import Need, Room
from harness.runner import run
from harness.server.launch import Launch
from harness.server.log import Cause, Failure
from harness.server.process import ServerFailed
from harness.suite import SuiteError, load, load_all
from harness.verdict import Verdict
from helix_runtime.planner import calibrate, load_gpu
from helix_runtime.proof import RankProof

CPU = Hardware(family="cpu", name="a CPU", count=2, memory_bytes=2**34)
SPEC = BenchSpec(loads=(Load(input=100, output=10, concurrency=2),), rounds=4, goodput=Goodput(ttft_ms=500))
HELIX = Cell(
    mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k2", tp=4, kvp=2, comm="a2a"
)  # fmt: skip
BASE = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k2", tp=4)
SUITE = """\
schema: 1
name: mine
description: d
groups:
  - name: g
    mode: helix-gqa
    backend: HELIX_CPU
    hardware: cpu
    model: recipe:llama-k2
    layout: {tp: 4, dcp: 2}
    bench:
      loads:
        - {input: 100, output: 10, concurrency: 2}
"""


def suite_of(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load(path)


def round_of(itl: float = 10.0, failed: int = 0, **changes) -> dict:
    """What `vllm bench serve` writes, as far as it is read."""
    times = {f"{p}_{what}_ms": itl for what in ("ttft", "itl") for p in ("p50", "p95", "p99")}
    return {
        "completed": 8 - failed, "failed": failed, **times, "median_ttft_ms": itl, "median_itl_ms": itl,
        "mean_tpot_ms": itl, "output_throughput": 1000 / itl, "total_token_throughput": 9000 / itl,
        "request_throughput": 10.0, "request_goodput": 9.0, **changes,
    }  # fmt: skip


def write_rounds(folder, ours=(8.0, 9.0, 8.0, 9.0), theirs=(10.0, 10.0, 10.0, 10.0), spec=SPEC, **changes):
    (folder / "rounds").mkdir(parents=True, exist_ok=True)
    for slot in slots(spec, folder):
        itl = (ours if slot.side == CELL else theirs)[slot.round]
        slot.file.write_text(json.dumps(round_of(itl, **(changes if slot.side == CELL else {}))))
    for side, tokens in ((CELL, 2000), (BASELINE, 1000)):
        (folder / side).mkdir(exist_ok=True)
        kv = KvCapacity(tokens=tokens, blocks=100, block_size=10, bytes=4096)
        (folder / side / "kv.json").write_text(kv.model_dump_json())


def proofs() -> tuple[RankProof, ...]:
    counters = {"decode_attention": 6, "decode_combine": 6, "all_to_all": 6, "exchange_members": 12}
    return tuple(
        RankProof(
            rank=rank, tp=4, kvp=2, tpa=2, kvp_rank=rank % 2, tpa_rank=rank // 2, helix=True, backend="HELIX_CPU",
            impl="i", combine="a2a", combine_impl="f", group_size=2, group_ranks=(rank // 2 * 2, rank // 2 * 2 + 1),
            interleave=1, lse_base="e", model_runner="r", vllm_version="0.32.0", self_test="ok",
            counters={**counters, "local_tokens": 50, "global_tokens": 100},
        )
        for rank in range(4)
    )  # fmt: skip


# What a suite may ask ------------------------------------------------------------------------------------------------


def test_a_bench_cell_runs_its_baseline_itself(tmp_path):
    plan = expand([suite_of(tmp_path, SUITE)], [CPU])
    assert len(plan) == 1 and plan[0].bench.rounds == 5
    assert plan[0].baseline.mode is Mode.STANDARD_TP and plan[0].baseline.workload == plan[0].cell.workload
    assert plan[0].cell.workload == "bench-100+10x2-r5", "another load is another cell"
    assert plan[0].bench.loads[0].per_round == 8


def test_perf_is_run_by_its_name_only():
    assert "perf" not in [suite.name for suite in load_all()]
    plan = expand(load_all(["perf"]), [CPU])
    here = [item for item in plan if item.skip is None]
    assert {item.cell.mode for item in here} == {Mode.HELIX_GQA, Mode.HELIX_MLA} and all(item.bench for item in plan)
    assert all(item.declared is Verdict.PASS for item in here)


def test_what_ci_measures_has_capacity_to_win_by_both_kinds_of_sharing():
    """GQA: TP 4 on 2 KV heads, max(1, TP / K) = 2. MLA: DCP = TP = 2. A ratio of 1 would prove nothing."""
    assert "perf-smoke" not in [suite.name for suite in load_all()]
    cells = {item.cell.mode: item for item in expand(load_all(["perf-smoke"]), [CPU])}
    gqa, mla = cells[Mode.HELIX_GQA], cells[Mode.HELIX_MLA]
    assert len(cells) == 2 and all(item.skip is None and item.declared is Verdict.PASS for item in cells.values())
    assert shape_of(gqa.cell.model).num_kv_heads == 2 and gqa.cell.tp == 4 and promised(gqa.cell) == 2
    assert mla.cell.kvp == mla.cell.tp == 2 and promised(mla.cell) == 2


@pytest.mark.parametrize(
    "changed, said",
    [
        (("concurrency: 2}", "concurrency: 2, speed: 3}"), "unknown key 'speed'; allowed: input, output, concurrency"),
        (("output: 10", "output: 1"), "greater than or equal to 2"),
        (("mode: helix-gqa", "mode: standard-tp"), "measures a cell against its standard-TP baseline"),
        (("    bench:\n", "    bench:\n      rounds: 1\n"), "greater than or equal to 2"),
        (("    bench:\n", "    bench:\n      goodput: {itl: 3}\n"), "allowed: ttft_ms, tpot_ms, e2el_ms"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, changed, said):
    with pytest.raises(SuiteError) as refused:
        suite_of(tmp_path, SUITE.replace(*changed))
    assert said in str(refused.value), refused.value


# Rounds --------------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_both_sides_are_asked_the_same(tmp_path):
    found = list(slots(SPEC, tmp_path))
    assert [slot.side[0] for slot in found] == list("cbbccbbc")
    for number in range(SPEC.rounds):
        ours, theirs = ([s.seed for s in found if s.round == number and s.side == side] for side in (CELL, BASELINE))
        assert ours == theirs
    assert len({slot.seed for slot in found}) == SPEC.rounds, "no round finds another's prompts in the prefix cache"
    assert len({slot.file for slot in found}) == len(found)


def test_the_load_generators_arguments(tmp_path):
    launch = Launch(argv=(), env=(), name="helix-1", api_key="secret", port=21000, model="/m")
    made = arguments(launch, SPEC, SPEC.loads[0], 7, tmp_path / "x.json")
    pairs = dict(pairwise(made))
    assert pairs["--random-input-len"] == "100" and pairs["--random-output-len"] == "10"
    assert pairs["--max-concurrency"] == "2" and pairs["--num-prompts"] == "8" and pairs["--seed"] == "7"
    assert pairs["--goodput"] == "ttft:500" and pairs["--metric-percentiles"] == "50,95,99"
    assert pairs["--base-url"] == "http://127.0.0.1:21000" and "secret" not in " ".join(made)


def test_what_forces_tokens_is_left_out_of_a_measured_server():
    launch = Launch(
        argv=("vllm", "serve", "m", "--logits-processors", "a:B", "--seed", "0"), env=(), name="n", api_key="k",
        port=1, model="m",
    )  # fmt: skip
    assert undisturbed(launch).argv == ("vllm", "serve", "m", "--seed", "0")
    assert undisturbed(undisturbed(launch)).argv == ("vllm", "serve", "m", "--seed", "0")


class FakeGenerator:
    """Writes a round, or fails at the n-th one."""

    ran: list
    fail_at: int | None = None

    def __init__(self, log, cancel):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, args, api_key):
        if len(self.ran) == self.fail_at:
            raise LoadFailed("the load generator died")
        pairs = dict(pairwise(args))
        file = measuring.Path(pairs["--result-dir"]) / pairs["--result-filename"]
        self.ran.append(file.stem)
        file.write_text(json.dumps(round_of()))


class FakeSides:
    started: list

    def __init__(self, cells, folder, where):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def need(self, side):
        self.started.append(side)
        launch = Launch(argv=(), env=(), name="n", api_key="k", port=1, model="m")
        return SimpleNamespace(launch=launch, check=lambda: None)


@pytest.fixture
def fakes(monkeypatch):
    generator = type("G", (FakeGenerator,), {"ran": []})
    sides = type("S", (FakeSides,), {"started": []})
    monkeypatch.setattr(measuring, "Generator", generator)
    monkeypatch.setattr(measuring, "Sides", sides)
    return generator, sides


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, fakes):
    generator, sides = fakes
    generator.fail_at, told = 3, []
    asked = ({CELL: HELIX, BASELINE: BASE}, SPEC, tmp_path, Where(threading.Event()), told.append)
    with pytest.raises(LoadFailed):
        measure(*asked)
    assert len(generator.ran) == 3 and told[-1].startswith("bench     3/8 baseline 100+10x2: tok/s 100.0")
    generator.fail_at = None
    measure(*asked)
    assert len(generator.ran) == 8 == len(set(generator.ran)), "no round ran twice"
    assert "3 rounds of" in told[3] and told[4].startswith("bench     4/8")
    sides.started.clear()
    measure(*asked)
    assert sides.started == [] and len(generator.ran) == 8, "nothing is left to do, so nothing is started"


def on_gpus(share: float) -> dict:
    """The measured pair on GPUs, of which each takes `share`."""
    serve = (("gpu-memory-utilization", share), ("kv-cache-memory-bytes", 2**30))
    pair = {CELL: HELIX, BASELINE: BASE}
    return {side: cell.model_copy(update={"hardware": "hopper", "serve": serve}) for side, cell in pair.items()}


@pytest.mark.parametrize(("share", "at_once"), [(0.45, 2), (0.9, 1)])
def test_on_gpus_both_stay_up_where_they_leave_room_for_each_other(tmp_path, monkeypatch, share, at_once):
    up, most, meet = [], [], threading.Barrier(at_once)

    def start(self, side):
        meet.wait(20)
        up.append(side)
        most.append(len(up))
        self._up[side] = (SimpleNamespace(check=lambda: None), SimpleNamespace(close=lambda: up.remove(side)))

    monkeypatch.setattr(Sides, "_start", start)
    host = Host(Room(gpus=tuple(f"GPU-{number}" for number in range(4)), cores=8))
    with Sides(on_gpus(share), tmp_path, Where(threading.Event(), host=host)) as sides:
        assert [sides.need(side) and len(up) for side in (CELL, BASELINE)] == [at_once, at_once]
        assert host.take(Need(gpus=1, share=0.05)) is None, "measured cells are alone on their GPUs"
    assert up == [] and max(most) == at_once


def test_where_one_of_two_does_not_start_the_other_is_stopped(tmp_path, monkeypatch):
    up, meet = [], threading.Barrier(2)

    def start(self, side):
        meet.wait(20)
        if side == CELL:
            raise ServerFailed(Failure(cause=Cause.REFUSED, reason="a rule"))
        up.append(side)
        self._up[side] = (None, SimpleNamespace(close=lambda: up.remove(side)))

    monkeypatch.setattr(Sides, "_start", start)
    host = Host(Room(gpus=tuple(f"GPU-{number}" for number in range(4)), cores=8))
    with (
        pytest.raises(ServerFailed, match="a rule"),
        Sides(on_gpus(0.4), tmp_path, Where(threading.Event(), host=host)) as sides,
    ):
        sides.need(BASELINE)
    assert up == []
    host.take(Need(gpus=4)).release()


def test_rounds_of_another_question_are_not_mixed_in(tmp_path, fakes):
    generator, _ = fakes
    cells, where = {CELL: HELIX, BASELINE: BASE}, Where(threading.Event())
    measure(cells, SPEC, tmp_path, where, lambda line: None)
    measure({**cells, CELL: HELIX.model_copy(update={"interleave": 16})}, SPEC, tmp_path, where, lambda line: None)
    assert len(generator.ran) == 16


def test_a_torn_round_is_no_round(tmp_path):
    (tmp_path / "r.json").write_text('{"completed": 8, "du')
    assert finished(tmp_path / "r.json") is None and finished(tmp_path / "none.json") is None
    (tmp_path / "r.json").write_text(json.dumps(round_of()))
    assert finished(tmp_path / "r.json")["completed"] == 8


# Numbers -------------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    """Logs with mean 2, deviation 1, three rounds: 4.303 / sqrt(3) to each side."""
    found = interval([math.e, math.e**2, math.e**3])
    assert found.n == 3 and found.value == pytest.approx(math.e**2)
    assert math.log(found.high) == pytest.approx(2 + 4.303 / math.sqrt(3)) and found.low > 0
    assert interval([5.0]).low is None and interval([5.0]).value == pytest.approx(5)
    plain = interval([0.0, 1.0, 2.0])
    assert plain.value == 1 and plain.low == pytest.approx(1 - 4.303 / math.sqrt(3)), "no logs of zero"
    wide = interval([1.0, math.e] * 20)
    assert math.log(wide.high) - 0.5 == pytest.approx(2.131 * 0.50637 / math.sqrt(40), rel=1e-3)


def test_ratios_are_paired_by_round():
    """A host that gets twice as slow halfway: the ratio stays what it is."""
    found = ratio([8.0, 16.0, 8.0], [10.0, 20.0, 10.0])
    assert found.value == pytest.approx(0.8) and found.low == pytest.approx(0.8) == pytest.approx(found.high)
    assert ratio([1.0, 0.0], [1.0, 1.0]) is None


def test_the_cache_is_read_from_the_servers_metrics():
    page = (
        "# HELP vllm:cache_config_info Information\n# TYPE vllm:cache_config_info gauge\n"
        'vllm:cache_config_info{block_size="32",cache_dtype="auto",kv_cache_memory_bytes="67108864",'
        'kv_cache_size_tokens="174720",kv_cache_dtype_skip_layers="[]",num_gpu_blocks="2730"} 1.0\n'
    )
    labels = cache_labels(page)
    assert labels["kv_cache_size_tokens"] == "174720" and labels["num_gpu_blocks"] == "2730"
    assert labels["kv_cache_memory_bytes"] == "67108864" and cache_labels("nothing 1\n") == {}


def test_a_result_has_every_metric_with_its_interval(tmp_path):
    write_rounds(tmp_path)
    found = gather(HELIX, SPEC, tmp_path, "", "vllm bench serve 0")
    assert found.kv_ratio == 2.0 == found.promised and found.side_by_side
    metrics = {metric.name: metric for metric in found.loads[0].metrics}
    assert {"TTFT p50", "ITL p50", "ITL p95", "ITL p99", "output", "goodput"} <= set(metrics)
    assert metrics["ITL p50"].cell.value == pytest.approx(math.sqrt(72)) and metrics[
        "ITL p50"
    ].baseline.value == pytest.approx(10)
    assert metrics["ITL p50"].ratio.value == pytest.approx(math.sqrt(0.8 * 0.9))
    assert metrics["ITL p50"].ratio.low < 0.85 < metrics["ITL p50"].ratio.high
    listed = {statistic.name: statistic for statistic in statistics(found)}
    assert listed["KV capacity against the promised"].value == 0
    named = listed["ITL p50, 100 in, 10 out, 2 at a time"]
    assert named.bound is None and named.low < named.value < named.high and "baseline 10" in named.note


def test_times_never_fail_a_cell_and_capacity_does(tmp_path):
    write_rounds(tmp_path, ours=(90.0,) * 4)
    slow = gather(HELIX, SPEC, tmp_path, "", "g")
    assert judge(HELIX, slow, proofs())[0] is Verdict.PASS
    assert judge(HELIX, slow, ())[0] is Verdict.UNPROVEN
    short = slow.model_copy(update={"kv": slow.kv.model_copy(update={"tokens": 1950})})
    verdict, said = judge(HELIX, short, proofs())
    assert verdict is Verdict.FAIL and "holds 1.95 times the baseline's tokens, not 2" in said
    near = slow.model_copy(update={"kv": slow.kv.model_copy(update={"tokens": 1970})})
    assert judge(HELIX, near, proofs())[0] is Verdict.PASS, "within 2 %"


def test_failed_requests_fail_the_cell_unless_the_baselines_fail_too(tmp_path):
    write_rounds(tmp_path, failed=1)
    found = gather(HELIX, SPEC, tmp_path, "", "g")
    verdict, said = judge(HELIX, found, proofs())
    assert verdict is Verdict.FAIL and said.startswith("4 requests failed")
    theirs = found.loads[0].model_copy(update={"baseline_failed": 1})
    assert judge(HELIX, found.model_copy(update={"loads": (theirs,)}), proofs())[0] is Verdict.ERROR


# Predictions and rows ------------------------------------------------------------------------------------------------


def test_predictions_stand_beside_measurements_where_the_hardware_is_known():
    cell = Cell(
        mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model="nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
        tp=8, kvp=2, interleave=16, comm="a2a",
    )  # fmt: skip
    told = predict(cell, Load(input=100_000, output=500, concurrency=4), "NVIDIA H200")
    assert told.cell_low_ms < told.cell_ms < told.cell_high_ms and told.why_not == ""
    assert told.ratio == pytest.approx(told.cell_ms / told.baseline_ms) and told.ratio > 1, (
        "K = 8 on TP 8 gains nothing"
    )
    longer = predict(cell, Load(input=120_000, output=500, concurrency=8), "NVIDIA H200")
    assert longer.cell_ms > told.cell_ms
    assert "no figures for Abacus" in predict(cell, Load(input=1, output=2, concurrency=1), "Abacus").why_not
    assert "CPU" in predict(HELIX, SPEC.loads[0], "").why_not


def test_predictions_are_of_the_cells_own_options():
    """Eager: 32 layers of 10 kernels, each at the host's 5 µs instead of a graph's, on both sides. And the exchange."""
    cell = Cell(
        mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model="nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
        tp=8, kvp=2, interleave=16, comm="a2a",
    )  # fmt: skip
    load = Load(input=8000, output=1000, concurrency=16)
    graphs, eager = (
        predict(cell.model_copy(update={"serve": serve}), load, "NVIDIA H200")
        for serve in ((), (("enforce-eager", True),))
    )
    added = 320 * (5e-6 - calibrate("h200")["launch"].overhead) * 1e3
    assert 1.2 < added < 1.4
    assert eager.cell_ms == pytest.approx(graphs.cell_ms + added)
    assert eager.baseline_ms == pytest.approx(graphs.baseline_ms + added)
    assert eager.cell_high_ms == pytest.approx(graphs.cell_high_ms + added * 1.35)
    assert eager.cell_low_ms == pytest.approx(graphs.cell_low_ms + added / 1.35)

    qwen = Cell(
        mode=Mode.STANDARD_DCP, backend="FLASH_ATTN", hardware="hopper", model="Qwen/Qwen3-30B-A3B",
        tp=8, kvp=2, interleave=16, comm="a2a",
    )  # fmt: skip
    once = predict(qwen, Load(input=1000, output=1000, concurrency=64), "NVIDIA H200")
    twice = predict(
        qwen.model_copy(update={"comm": "ag_rs"}), Load(input=1000, output=1000, concurrency=64), "NVIDIA H200"
    )
    gather, exchange = (load_gpu("h200").wait(kind) for kind in ("all-gather", "all-to-all"))
    # Two collectives a layer in place of one All-to-All of more than 16 KB, on two ranks.
    waits = 2 * (gather.latency + gather.per_doubling), exchange.latency + exchange.per_doubling + exchange.large
    wait = 48 * (waits[0] - waits[1]) * 1e3
    assert twice.cell_ms == pytest.approx(once.cell_ms + wait)
    assert twice.baseline_ms == once.baseline_ms


def item_of(tmp_path):
    return expand([suite_of(tmp_path, SUITE)], [CPU])[0].model_copy(update={"bench": SPEC})


def test_a_row_carries_the_measurements_and_survives_the_ledger(tmp_path):
    from harness.ledger import read, results

    item = item_of(tmp_path)

    def measured(cells, spec, folder, where, progress):
        assert cells == {CELL: item.cell, BASELINE: item.baseline}
        write_rounds(folder)

    made = bench_cells.run_bench(
        item, tmp_path / "c", where=Where(threading.Event()), progress=print, measuring=measured
    )
    assert made.verdict is Verdict.UNPROVEN and made.kv_cache_tokens == 2000 and made.bench.loads[0].failed == 0
    assert json.loads((tmp_path / "c" / "bench.json").read_text())["promised"] == 2.0
    from harness.ledger import Ledger

    ledger = Ledger(tmp_path / "run")
    ledger.result(made, "key")
    assert results(read(ledger.path)[0]) == [made]


@pytest.mark.parametrize(
    "problem, verdict, said",
    [
        (ServerFailed(Failure(cause=Cause.REFUSED, reason="TP=3 …")), Verdict.REJECTED, "TP=3"),
        (ServerFailed(Failure(cause=Cause.OUT_OF_MEMORY, reason="no memory")), Verdict.ERROR, "no memory"),
        (LoadFailed("the load generator died"), Verdict.ERROR, "died"),
        (OSError(28, "No space left on device"), Verdict.ERROR, "No space left"),
    ],
)
def test_infrastructure_is_no_verdict(tmp_path, problem, verdict, said):
    def broken(*_):
        raise problem

    made = bench_cells.run_bench(
        item_of(tmp_path), tmp_path / "c", where=Where(threading.Event()), progress=print, measuring=broken
    )
    assert made.verdict is verdict and said in made.reason


def test_the_scheduler_hands_bench_cells_over(tmp_path, monkeypatch):
    item, asked = item_of(tmp_path), []

    def instead(item, folder, *, where, progress, versions, hardware_name):
        asked.append((item.cell.id, folder.parent.name))
        return bench_cells.run_bench(
            item, folder, where=where, progress=progress, versions=versions, hardware_name=hardware_name,
            measuring=lambda cells, spec, folder, where, progress: write_rounds(folder),
        )  # fmt: skip

    monkeypatch.setattr("harness.runner.run_bench", instead)
    found = run([item], run_dir=tmp_path / "run", progress=lambda line: None)
    assert asked == [(item.cell.id, "cells")] and found[0].bench is not None and found[0].cell == item.cell


def test_the_report_shows_predicted_beside_measured(tmp_path):
    from harness.ledger import Ledger
    from harness.report import write

    item = item_of(tmp_path)
    made = bench_cells.run_bench(
        item,
        tmp_path / "c",
        where=Where(threading.Event()),
        progress=print,
        measuring=lambda cells, spec, folder, where, progress: write_rounds(folder),
    )
    ledger = Ledger(tmp_path / "run")
    ledger.run_start("run", [item.cell.id], ["cpu"], [])
    ledger.result(made, "key")
    ledger.run_end()
    page = write(tmp_path / "run").read_text()
    for shown in ("Predicted and measured", "KV tokens against the baseline", "ITL p99", "no prediction on a CPU"):
        assert shown in page, shown

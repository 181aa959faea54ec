"""From the files of a bench cell to its result: metrics with intervals, KV capacity against the promise, the verdict.

Times are shown and never judged. What can fail a cell: requests that fail, a capacity that misses its promise.
"""

from collections.abc import Sequence
from pathlib import Path

from harness.bench.measure import BASELINE, CELL, finished, side_by_side, slots
from harness.bench.predict import predict
from harness.bench.result import BenchResult, KvCapacity, LoadResult, Metric, interval, ratio
from harness.bench.spec import BenchSpec, Load
from harness.capacity import TOLERANCE, promised
from harness.cell import Cell
from harness.oracle.proof import check_proof
from harness.result import Statistic
from harness.verdict import Verdict
from helix_runtime.layout import LayoutError
from helix_runtime.proof import RankProof

#: (name, unit, key of vLLM's result).
METRICS = (
    ("TTFT p50", "ms", "p50_ttft_ms"),
    ("TTFT p99", "ms", "p99_ttft_ms"),
    ("ITL p50", "ms", "p50_itl_ms"),
    ("ITL p95", "ms", "p95_itl_ms"),
    ("ITL p99", "ms", "p99_itl_ms"),
    ("time a token", "ms", "mean_tpot_ms"),
    ("output", "tokens/s", "output_throughput"),
    ("all tokens", "tokens/s", "total_token_throughput"),
    ("requests", "1/s", "request_throughput"),
    ("goodput", "1/s", "request_goodput"),
)
#: Metrics that also stand among a cell's statistics.
HEADLINE = ("ITL p50", "output")


def gather(cell: Cell, spec: BenchSpec, folder: Path, device: str, generator: str) -> BenchResult:
    """What the files in `folder` say. Raises LookupError where a round is missing."""
    loads = tuple(_load(cell, spec, load, folder, device) for load in spec.loads)
    try:
        factor = promised(cell)
    except (LookupError, LayoutError):
        factor = None
    return BenchResult(
        loads=loads,
        rounds=spec.rounds,
        side_by_side=side_by_side((cell, cell)),
        generator=generator,
        kv=_kv(folder / CELL),
        baseline_kv=_kv(folder / BASELINE),
        promised=factor,
    )


def judge(cell: Cell, found: BenchResult, proofs: Sequence[RankProof]) -> tuple[Verdict, str]:
    """The verdict and its sentence."""
    said = summary(found)
    failed = sum(load.failed for load in found.loads)
    if sum(load.baseline_failed for load in found.loads):
        return Verdict.ERROR, f"requests to the baseline failed; {said}"
    if failed:
        return Verdict.FAIL, f"{failed} requests failed, none of the baseline's; {said}"
    if capacity_miss(found) > TOLERANCE:
        held = f"the KV cache holds {found.kv_ratio:.3g} times the baseline's tokens, not {found.promised:g}"
        return Verdict.FAIL, f"{held}; {said}"
    if unproven := check_proof(cell, proofs):
        return Verdict.UNPROVEN, f"{said}; but {unproven}"
    return Verdict.PASS, said


def capacity_miss(found: BenchResult) -> float:
    """How far the measured ratio of KV tokens is from the promised; 0 where one of them is not known."""
    if found.promised is None or found.kv_ratio is None:
        return 0.0
    return abs(found.kv_ratio / found.promised - 1)


def summary(found: BenchResult) -> str:
    """Capacity, then time between tokens and throughput of the first load, each against the baseline."""
    said = []
    if found.kv_ratio is not None:
        promise = f" (promised {found.promised:g})" if found.promised is not None else ""
        said.append(f"{found.kv_ratio:.3g} times the KV tokens{promise}")
    load = found.loads[0]
    for name in ("ITL p50", "output"):
        metric = next(metric for metric in load.metrics if metric.name == name)
        if metric.ratio:
            said.append(f"{name} {metric.cell.value:.4g} {metric.unit}, {metric.ratio.value:.2f} times the baseline's")
    return ", ".join(said) + f" ({load.input} in, {load.output} out, {load.concurrency} at a time)"


def statistics(found: BenchResult) -> tuple[Statistic, ...]:
    """What stands among the statistics of all cells; every metric is in the result itself."""
    listed = []
    if found.promised is not None and found.kv_ratio is not None:
        listed.append(
            Statistic(
                name="KV capacity against the promised",
                value=capacity_miss(found),
                bound=TOLERANCE,
                n=1,
                unit="relative",
                note=f"{found.kv.tokens} tokens, {found.kv_ratio:.4g} times the baseline's {found.baseline_kv.tokens}; "
                f"the layout promises {found.promised:g}",
            )
        )
    for load in found.loads:
        for metric in (metric for metric in load.metrics if metric.name in HEADLINE):
            listed.append(
                Statistic(
                    name=f"{metric.name}, {load.input} in, {load.output} out, {load.concurrency} at a time",
                    value=metric.cell.value,
                    bound=None,
                    n=metric.cell.n,
                    unit=metric.unit,
                    low=metric.cell.low,
                    high=metric.cell.high,
                    null=metric.baseline.value,
                    note=_ratio_told(metric),
                )
            )
    return tuple(listed)


def _ratio_told(metric: Metric) -> str:
    baseline = f"baseline {metric.baseline.value:.4g}"
    if metric.ratio is None:
        return baseline
    spread = f" ({metric.ratio.low:.3f} to {metric.ratio.high:.3f})" if metric.ratio.low is not None else ""
    return f"{baseline}; ratio {metric.ratio.value:.3f}{spread}"


def _load(cell: Cell, spec: BenchSpec, load: Load, folder: Path, device: str) -> LoadResult:
    rounds: dict[str, list[dict]] = {CELL: [], BASELINE: []}
    for slot in slots(spec, folder):
        if slot.load == load:
            found = finished(slot.file)
            if found is None:
                raise LookupError(f"round {slot.round} of {load.label} is missing on the side of the {slot.side}")
            rounds[slot.side].append(found)
    metrics = []
    for name, unit, key in METRICS:
        values = {side: [found.get(key) for found in listed] for side, listed in rounds.items()}
        if any(value is None for listed in values.values() for value in listed):
            continue  # goodput, where no target is set
        metrics.append(
            Metric(
                name=name,
                unit=unit,
                cell=interval(values[CELL]),
                baseline=interval(values[BASELINE]),
                ratio=ratio(values[CELL], values[BASELINE]),
            )
        )
    failed = {side: sum(found.get("failed", 0) for found in listed) for side, listed in rounds.items()}
    return LoadResult(
        input=load.input,
        output=load.output,
        concurrency=load.concurrency,
        requests=load.per_round * spec.rounds,
        metrics=tuple(metrics),
        failed=failed[CELL],
        baseline_failed=failed[BASELINE],
        predicted=predict(cell, load, device),
    )


def _kv(folder: Path) -> KvCapacity | None:
    file = folder / "kv.json"
    return KvCapacity.model_validate_json(file.read_text()) if file.exists() else None

"""What a bench cell came to: numbers with intervals, of the cell, of its baseline, and their ratio. Plain values."""

import math
from collections.abc import Sequence

from harness.frozen import Frozen

#: 97.5th percentile of Student's t by degrees of freedom; the last one serves all above.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Interval(Frozen):
    """A geometric mean over `n` rounds and its 95 % interval (Student's t); both ends are None for a single round."""

    value: float
    low: float | None
    high: float | None
    n: int


class Metric(Frozen):
    """One number of one load. `ratio`: cell over baseline, paired by round; below 1 is better for times (`unit` ms)."""

    name: str
    unit: str
    cell: Interval
    baseline: Interval
    ratio: Interval | None


class Prediction(Frozen):
    """The planner's milliseconds between tokens, with its band; `why_not` where it has none for this hardware."""

    cell_ms: float | None = None
    cell_low_ms: float | None = None
    cell_high_ms: float | None = None
    baseline_ms: float | None = None
    ratio: float | None = None
    why_not: str = ""


class LoadResult(Frozen):
    """One load: its sizes, its metrics, requests that failed in all rounds, and the planner's word on it."""

    input: int
    output: int
    concurrency: int
    requests: int
    metrics: tuple[Metric, ...]
    failed: int
    baseline_failed: int
    predicted: Prediction


class KvCapacity(Frozen):
    """KV cache as the server's metrics tell it. `bytes`: of one rank, None where the server does not say."""

    tokens: int
    blocks: int | None
    block_size: int | None
    bytes: int | None


class BenchResult(Frozen):
    """`promised`: the planner's ratio of KV capacities; `side_by_side`: both servers were up at the same time."""

    loads: tuple[LoadResult, ...]
    rounds: int
    side_by_side: bool
    generator: str
    kv: KvCapacity | None
    baseline_kv: KvCapacity | None
    promised: float | None

    @property
    def kv_ratio(self) -> float | None:
        if self.kv is None or self.baseline_kv is None or not self.baseline_kv.tokens:
            return None
        return self.kv.tokens / self.baseline_kv.tokens


def interval(values: Sequence[float]) -> Interval:
    """Geometric mean and 95 % interval, so that no time is below zero; the plain ones where a value is not above 0.

    ValueError for no values.
    """
    if not values:
        raise ValueError("no rounds")
    if min(values) <= 0:
        return _student(values)
    logs = _student([math.log(value) for value in values])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(value=math.exp(logs.value), low=low, high=high, n=logs.n)


def ratio(cell: Sequence[float], baseline: Sequence[float]) -> Interval | None:
    """Geometric mean of the paired ratios with its interval; None where a value is not above 0."""
    pairs = list(zip(cell, baseline, strict=True))
    if not pairs or any(ours <= 0 or theirs <= 0 for ours, theirs in pairs):
        return None
    return interval([ours / theirs for ours, theirs in pairs])


def _student(values: Sequence[float]) -> Interval:
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Interval(value=mean, low=None, high=None, n=1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = _T[min(n - 2, len(_T) - 1)] * deviation / math.sqrt(n)
    return Interval(value=mean, low=mean - half, high=mean + half, n=n)

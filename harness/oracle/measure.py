"""The statistics of one comparison, each with its n, its interval, the null's own value and, if judged, its bound.

Judged are: missing answers; the largest change (of any token, and of the imposed one) and the largest KL of a step, for
defects that hit few steps; the number of decode steps beyond the null's 99.9 % point, for defects that hit some steps
by less than a largest value needs; and how loud the changes are on the whole and in each group of steps, for defects
that hit many steps a little. The others are shown: a best token cannot be lost beyond twice the largest change without
that change, and means of KL follow from both.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from harness.oracle.band import Band, PhaseBand, Spread
from harness.oracle.compare import Comparison, StepChange
from harness.oracle.statistics import bootstrap_interval, exact_interval, level_bound
from harness.result import Statistic

#: Stands for "no number" in statistics, which travel as JSON; vLLM's API writes -inf as -9999.
NO_NUMBER = 9999.0
LEAST_GROUP = 8  # steps of a group that is judged for itself
#: Of a largest value, the null's own number is its 99.9 % point: one clean cell in a thousand goes beyond.
POINT = 1e-3
LARGEST = 7  # largest change, change of the imposed token and KL, of prefill and of decode; steps beyond, of decode


class Rates:
    """How the false-alarm rate of a cell is shared: half among what single steps do, half among the levels."""

    def __init__(self, cell: float):
        self.cell = cell
        self.largest = cell / 2 / LARGEST

    def level(self, levels: int) -> float:
        return self.cell / 2 / max(1, levels)


def measure(found: Comparison, band: Band, rates: Rates) -> tuple[Statistic, ...]:
    """All statistics: missing answers, then those of prefill's token (step 0), then those of decode."""
    note = "; ".join(f"{item.prompt}: {item.reason}" for item in found.missing[:3])
    asked = len({step.prompt for step in found.steps} | {item.prompt for item in found.missing})
    missing = Statistic(name="missing answers", value=len(found.missing), bound=0, n=asked, unit="prompts", note=note)
    prefill = [step for step in found.steps if step.prefill]
    decode = [step for step in found.steps if not step.prefill]
    groups: dict[str, list[StepChange]] = defaultdict(list)
    for step in decode:
        for group in step.groups:
            groups[group].append(step)
    judged = {name: steps for name, steps in sorted(groups.items()) if len(steps) >= LEAST_GROUP}
    rate = rates.level(len(judged) + 2)
    return (
        missing,
        *_of_phase("prefill", prefill, band, rates, rate),
        *_of_phase("decode", decode, band, rates, rate),
        *(_loudness(f"decode, {name}", steps, band, rate, group=True) for name, steps in judged.items()),
    )


def beyond(statistics: Sequence[Statistic]) -> list[Statistic]:
    """Those beyond their bounds, NaN included."""
    return [item for item in statistics if item.bound is not None and not item.value <= item.bound]


def _of_phase(phase: str, steps: Sequence[StepChange], band: Band, rates: Rates, rate: float) -> list[Statistic]:
    if not steps:
        return []
    n, null, spread = len(steps), band.phase(phase == "prefill"), band.spread.cell
    widest, point = (null.change.bound(rate_, n, spread) for rate_ in (rates.largest, POINT))
    lost = [step for step in steps if not step.same_best and not step.margin <= 2 * widest]
    said = "; ".join(f"{step.prompt} step {step.step}, margin {step.margin:.2g}" for step in lost[:3])
    said = said or f"counted beyond a margin of {2 * widest:.2g} nat"
    kept = sum(step.same_best for step in steps)
    share = exact_interval(kept, n)

    def of(name: str, value: float, bound: float | None, unit: str, **more) -> Statistic:
        return Statistic(name=f"{phase}: {name}", value=min(value, NO_NUMBER), bound=bound, n=n, unit=unit, **more)

    return [
        of(
            "largest logprob change",
            max(step.widest for step in steps), widest, "nat", null=point,
        ),
        of(
            "largest change of the imposed token",
            max(step.change for step in steps), widest, "nat", null=point,
        ),
        of(
            "largest KL of the top tokens",
            max(step.kl for step in steps), null.distance.bound(rates.largest, n, spread) ** 2 / 2, "nat",
            null=null.distance.bound(POINT, n, spread) ** 2 / 2,
        ),
        of("best token lost despite its margin", len(lost), 0, "steps", note=said),
        *([] if phase == "prefill" else [_beyond_point(steps, band, rates.largest)]),
        _loudness(phase, steps, band, rate, group=False),
        _mean(f"{phase}: mean KL of the top tokens", steps, lambda step: step.kl, null.kl),
        _mean(f"{phase}: mean change of the imposed token", steps, lambda step: step.change, null.forced),
        _mean(f"{phase}: mean loss of the imposed token", steps, lambda step: step.loss, None),
        of("same best token", kept / n, None, "share", low=share.low, high=share.high, null=null.agreement),
        of("worst rank of the baseline's best token", max(step.rank for step in steps), None, "rank"),
    ]  # fmt: skip


def _beyond_point(steps: Sequence[StepChange], band: Band, rate: float) -> Statistic:
    """How many decode steps lie beyond what one null step in a thousand exceeds.

    Where the cell is on the whole louder than the null, so is its point: how much right servers differ as a whole is
    the levels' business, and would otherwise decide this count. What is left open is how well that is known.
    """
    null, n = band.decode, len(steps)
    ratio, error, _ = log_ratio(steps, null, band.floor)
    point, louder = null.change.point(POINT), max(1.0, math.exp(ratio))
    return Statistic(
        name="decode: steps beyond the null's 99.9 % point", value=sum(step.widest > point * louder for step in steps),
        bound=null.change.count_bound(point, rate, n, math.hypot(error, band.spread.group)), n=n, unit="steps",
        null=POINT * n, note=f"counted beyond {point * louder:.2g} nat",
    )  # fmt: skip


def _mean(name: str, steps: Sequence[StepChange], value: Callable[[StepChange], float], null: float | None):
    """A mean over steps with its bootstrap interval over prompts."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for step in steps:
        sums[step.prompt] += min(value(step), NO_NUMBER)
        counts[step.prompt] += 1
    interval = bootstrap_interval(list(sums.values()), list(counts.values()))
    mean = math.fsum(sums.values()) / len(steps)
    return Statistic(
        name=name, value=mean, bound=None, n=len(steps), unit="nat", low=interval.low, high=interval.high, null=null
    )


def _loudness(name: str, steps: Sequence[StepChange], band: Band, rate: float, group: bool) -> Statistic:
    """How loud the changes are against the null's: ratio of geometric means, paired by prompt and position.

    Its error has two parts: that of two means of `n` steps, and how much right servers differ as a whole, which no
    number of steps makes smaller.
    """
    if not steps:
        return Statistic(name=f"{name}: loudness against the null", value=0, bound=None, n=0, unit="times")
    null = band.phase(steps[0].prefill)
    ratio, error, rows = log_ratio(steps, null, band.floor)
    spread = _spread(band.spread, group)
    whole = math.hypot(error, spread)
    bound = math.exp(level_bound(rate, whole, band.spread.degrees))
    half = 1.96 * error
    return Statistic(
        name=f"{name}: loudness against the null", value=min(math.exp(ratio), NO_NUMBER), bound=bound,
        n=len(steps), unit="times", low=min(math.exp(ratio - half), NO_NUMBER),
        high=min(math.exp(ratio + half), NO_NUMBER), null=1.0,
        note="" if rows else "the null has other prompts: not paired",
    )  # fmt: skip


def _spread(spread: Spread, group: bool) -> float:
    return math.hypot(spread.cell, spread.group) if group else spread.cell


def log_ratio(steps: Sequence[StepChange], null: PhaseBand, floor: float) -> tuple[float, float, bool]:
    """(mean log ratio of changes to the null's, its standard error, whether it is paired by row), for one phase."""
    logs = np.log(np.clip([step.widest for step in steps], floor, NO_NUMBER))
    rows = {(row.prompt, row.bin): row for row in null.rows}
    paired = all((step.prompt, step.bin) in rows for step in steps)
    if not paired:
        here = len({(step.prompt, step.bin) for step in steps})
        error = math.hypot(null.sd * math.sqrt(1 / len(steps) + 1 / null.n), null.between / math.sqrt(here))
        return float(np.mean(logs) - null.level), error, False
    means = [rows[step.prompt, step.bin].mean for step in steps]
    number = sum(row.n for row in {(step.prompt, step.bin): rows[step.prompt, step.bin] for step in steps}.values())
    return float(np.mean(logs - np.array(means))), null.sd * math.sqrt(1 / len(steps) + 1 / number), True

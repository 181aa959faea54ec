"""A measured cell for a reader: load by load, each number with its interval beside the baseline's, and their ratio."""

import math
from dataclasses import dataclass

from markupsafe import Markup

from harness.bench.result import BenchResult, Interval, LoadResult, Metric
from harness.report.text import number, plural

_SPAN = math.log(4)  # the drawing reaches from a quarter to four times the baseline


@dataclass(frozen=True)
class Line:
    """One metric. Texts have their unit and interval; `tone` is `better` or `worse` where the interval leaves 1."""

    name: str
    cell: str
    baseline: str
    ratio: str
    tone: str
    drawing: Markup


@dataclass(frozen=True)
class Load:
    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Measured:
    loads: list[Load]
    about: str


def measured(bench: BenchResult | None) -> Measured | None:
    """None for a cell that was not measured."""
    if bench is None:
        return None
    turns = "both servers up, in turns" if bench.side_by_side else "one server after the other"
    return Measured(
        loads=[_load(load) for load in bench.loads],
        about=f"{bench.generator}; {plural(bench.rounds, 'round')}, {turns}; means with 95 % intervals",
    )


def _load(load: LoadResult) -> Load:
    sizes = f"{load.input:,} tokens in, {load.output:,} out, {load.concurrency} at a time"
    title = f"{sizes}, {plural(load.requests, 'request')}"
    lost = [
        f"{count} failed{whose}"
        for count, whose in ((load.failed, ""), (load.baseline_failed, " at the baseline"))
        if count
    ]
    return Load(", ".join([title, *lost]), [_line(metric) for metric in load.metrics])


def _line(metric: Metric) -> Line:
    def shown(one: Interval) -> str:
        return f"{number(one.value)} {metric.unit}{_ends(one)}"

    ratio = metric.ratio
    return Line(
        name=metric.name,
        cell=shown(metric.cell),
        baseline=shown(metric.baseline),
        ratio="–" if ratio is None else f"× {number(ratio.value)}{_ends(ratio)}",
        tone=_tone(metric),
        drawing=_drawn(ratio),
    )


def _ends(one: Interval) -> str:
    return "" if one.low is None or one.high is None else f" ({number(one.low)} to {number(one.high)})"


def _tone(metric: Metric) -> str:
    """Which side of the baseline the whole interval lies on; less is better for times."""
    ratio = metric.ratio
    if ratio is None or ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high:
        return ""
    less = ratio.high < 1
    return "better" if less == (metric.unit in ("ms", "s")) else "worse"


def _drawn(ratio: Interval | None) -> Markup:
    """The ratio's interval on a logarithmic scale around 1."""
    if ratio is None or not 0 < ratio.value < math.inf:
        return Markup("")

    def x(value: float) -> float:
        return 60 + 60 * max(-1.0, min(1.0, math.log(value) / _SPAN)) if value > 0 else 0.0

    low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
    return Markup(
        '<svg class="bar" viewBox="0 0 120 16" aria-hidden="true"><path class="tick" d="M60 1v14"/>'
        f'<path class="stem" d="M{x(low):.1f} 8H{x(high):.1f}"/>'
        f'<circle class="hit" cx="{x(ratio.value):.1f}" cy="8" r="3.5"/></svg>'
    )

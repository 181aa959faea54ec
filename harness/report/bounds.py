"""The oracle's statistics against their bounds: the nearest first, the others and those without a bound apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from markupsafe import Markup

from harness.report import drawing
from harness.report.table import share
from harness.report.text import escaped, number
from harness.result import Statistic

#: Statistics that stand beside the curve; the others are one click away.
_NEAR = 10


@dataclass(frozen=True)
class Lines:
    """Rows of a table: name, value, 95 % interval, bound, drawing, n. `notes` are told below it, by their number."""

    count: int
    rows: Markup
    notes: list[str]


def by_nearness(statistics: Sequence[Statistic]) -> tuple[Lines, Lines]:
    """Those nearest to their bound, with all beyond it, and the others; a value that is no number comes first."""
    ranked = sorted([(_share(one), one) for one in statistics], key=itemgetter(0), reverse=True)
    bounded = [one for _, one in ranked if one.bound is not None]
    shown = max(_NEAR, sum(found > 1 for found, _ in ranked))
    return _lines(bounded[:shown]), _lines(bounded[shown:] + [one for _, one in ranked if one.bound is None])


def _share(one: Statistic) -> float:
    if one.bound is None:
        return -math.inf
    found = share(one.value, one.bound)
    return found if found == found else math.inf


def _lines(statistics: Sequence[Statistic]) -> Lines:
    notes = list(dict.fromkeys(one.note for one in statistics if one.note))
    told = escaped([text for one in statistics for text in _texts(one)])
    rows = [
        f'<tr><th scope="row">{name}{f" <sup>{notes.index(one.note) + 1}</sup>" if one.note else ""}</th>'
        f'<td class="n">{value}</td><td class="n">{interval}</td><td class="n">{bound}</td>'
        f'<td>{drawing.against_bound(one)}</td><td class="n">{one.n:,}</td></tr>'
        for one, name, value, interval, bound in zip(
            statistics, told[::4], told[1::4], told[2::4], told[3::4], strict=True
        )
    ]
    return Lines(count=len(statistics), rows=Markup("".join(rows)), notes=notes)


def _texts(one: Statistic) -> tuple[str, str, str, str]:
    interval = f"{number(one.low)} to {number(one.high)}" if one.low is not None and one.high is not None else ""
    bound = "none" if one.bound is None else f"{number(one.bound)} {one.unit}".strip()
    return one.name, f"{number(one.value)} {one.unit}".strip(), interval, bound

"""Small inline SVG: verdict shapes, KL and |Δ logprob| by position, a statistic against its bound, bars."""

import math
from functools import cache

from markupsafe import Markup

from harness.report.text import number
from harness.result import CurvePoint, Difference, Statistic
from harness.verdict import Verdict

_WIDTH, _HEIGHT, _LEFT = 640, 132, 52
_BASE = _HEIGHT - 22  # y of the axis

#: One shape a verdict on a 16 x 16 field, told apart without colour. `f` is filled by the text colour.
_SHAPES = {
    Verdict.PASS: '<circle class="f" cx="8" cy="8" r="7.5"/>'
    '<path class="k" d="M4.6 8.3l2.3 2.4 4.5-5"/>',
    Verdict.FAIL: '<path class="f" d="M5 .5h6L15.5 5v6L11 15.5H5L.5 11V5z"/>'
    '<path class="k" d="M5.2 5.2l5.6 5.6m0-5.6l-5.6 5.6"/>',
    Verdict.FLAKY: '<path class="f" d="M8 0l8 8-8 8-8-8z"/>'
    '<path class="k" d="M4.4 8.6c1.2-2 2.4-2 3.6-.6s2.4 1.4 3.6-.6"/>',
    Verdict.UNPROVEN: '<circle class="o" cx="8" cy="8" r="7" stroke-dasharray="3.2 2.3"/>'
    '<path class="s" d="M6 6.3c.2-2.4 4-2.2 4 .1 0 1.5-2 1.6-2 3.1M8 11.6v.6"/>',
    Verdict.XPASS: '<path class="f" d="M8 0l2.1 5.3 5.7.4-4.4 3.7 1.4 5.6L8 12l-4.8 3 1.4-5.6L.2 5.7l5.7-.4z"/>',
    Verdict.XFAIL: '<circle class="o" cx="8" cy="8" r="7"/>'
    '<path class="s" d="M3.2 12.8l9.6-9.6"/>',
    Verdict.REJECTED: '<rect class="o" x="1" y="1" width="14" height="14" rx="2"/>'
    '<path class="s" d="M4.5 8h7"/>',
    Verdict.ERROR: '<path class="f" d="M8 .8l7.8 14H.2z"/>'
    '<path class="k" d="M8 6v4.4M8 12.2v.6"/>',
    Verdict.SKIP: '<path class="s" d="M3.5 8h9"/>',
    Verdict.STALE: '<circle class="o" cx="8" cy="8" r="7" stroke-dasharray="1.2 2"/>'
    '<path class="s" d="M8 4v4.2l2.6 1.6"/>',
}  # fmt: skip


def sprite() -> Markup:
    """The verdict shapes, once a page; used as `<svg class="shape"><use href="#shape-pass"/></svg>`."""
    symbols = (
        f'<symbol id="shape-{verdict}" viewBox="0 0 16 16">{shape}</symbol>' for verdict, shape in _SHAPES.items()
    )
    return Markup(
        f'<svg width="0" height="0" aria-hidden="true" focusable="false" class="sprite">{"".join(symbols)}</svg>'
    )


@cache
def verdict(word: str) -> Markup:
    """A verdict as every list shows it: its shape, then its word. A macro would be called a million times."""
    return Markup(
        '<span class="verdict v-{0}"><svg class="shape" aria-hidden="true" focusable="false">'
        '<use href="#shape-{0}"/></svg>{0}</span>'
    ).format(word)


def gap(difference: Difference) -> float | None:
    """|Δ logprob| of the baseline's best token; None where the cell does not have it in its top-k."""
    if not difference.baseline:
        return None
    token, logprob = difference.baseline[0]
    other = dict(difference.candidate).get(token)
    return None if other is None else _finite(abs(other - logprob))


def gaps(differences: tuple[Difference, ...]) -> Markup:
    """|Δ logprob| of the recorded steps over their position. A hollow mark on top: token not in the cell's top-k.

    Only numbers go in, so the parts need no escape.
    """
    if not differences:
        return Markup("")
    values = [gap(difference) for difference in differences]
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    positions = [difference.position for difference in differences]
    low, high = min(positions), max(positions)
    marks = []
    for difference, value in zip(differences, values, strict=True):
        share = (difference.position - low) / (high - low) if high > low else 0.5
        x = _LEFT + 8 + share * (_WIDTH - _LEFT - 20)
        y = 12 + (_BASE - 12) * (1 - (1.0 if value is None else value / top))
        kind, said = ("miss", "not in the top-k") if value is None else ("hit", f"|Δ| {number(value)} nat")
        marks.append(
            f'<path class="stem" d="M{x:.1f} {_BASE}V{y:.1f}"/>'
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>position {difference.position}, step {difference.step}: {said}</title></circle>"
        )
    label = f"|Δ logprob| at {len(values)} recorded steps, positions {low} to {high}, largest {number(top)} nat"
    foot = _HEIGHT - 6
    return Markup(
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f'<path class="axis" d="M{_LEFT} 6V{_BASE}H{_WIDTH}"/>'
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{number(top)}</text>'
        f'<text x="{_LEFT - 6}" y="{_BASE}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{foot}">position {low}</text>'
        f'<text x="{_WIDTH}" y="{foot}" text-anchor="end">{high}</text>{"".join(marks)}</svg>'
    )


def curve(points: tuple[CurvePoint, ...]) -> Markup:
    """KL by position against the null band, both axes by ranges: positions in the record's bins, KL by powers of ten.

    Dots: the mean of a bin, filled; its worst step, hollow. Line: the null's mean. Shade: up to the band.
    """
    values = [value for point in points for value in (point.kl, point.worst, point.null, point.band)]
    real = [value for value in values if value is not None and _finite(value) is not None and value > 0]
    if not real:
        return Markup("")
    bottom, top = math.floor(math.log10(min(real))), math.ceil(math.log10(max(real)))
    top += bottom == top
    bottom = max(bottom, top - 12)
    wide = (_WIDTH - _LEFT) / len(points)

    def height(value: float) -> float:
        """y of a KL: at the foot for 0, at the top for what is no number."""
        if value != value or value == math.inf:
            return 10.0
        share = (math.log10(value) - bottom) / (top - bottom) if value > 0 else 0.0
        return _BASE - (_BASE - 10) * min(1.0, max(0.0, share))

    parts, line = [], ""
    for place, point in enumerate(points):
        left = _LEFT + place * wide
        middle, right, edge = left + wide / 2, left + wide, height(point.band)
        parts.append(f'<path class="band" d="M{left:.1f} {_BASE}V{edge:.1f}H{right:.1f}V{_BASE}Z"/>')
        parts.append(f'<path class="edge" d="M{left:.1f} {edge:.1f}H{right:.1f}"/>')
        if point.null is not None:
            line += f"M{left + 4:.1f} {height(point.null):.1f}H{right - 4:.1f}"
        beyond = " beyond" if not point.worst <= point.band else ""
        null = "unknown" if point.null is None else number(point.null)
        said = (
            f"positions {point.low} to {point.high}: mean {number(point.kl)}, worst {number(point.worst)}, "
            f"null {null}, band {number(point.band)} nat, {point.n} steps"
        )
        mean, worst = height(point.kl), height(point.worst)
        parts.append(
            f'<g><title>{said}</title><path class="stem" d="M{middle:.1f} {mean:.1f}V{worst:.1f}"/>'
            f'<circle class="hit" cx="{middle:.1f}" cy="{mean:.1f}" r="4"/>'
            f'<circle class="miss{beyond}" cx="{middle:.1f}" cy="{worst:.1f}" r="4"/></g>'
            f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{_range(point.low, point.high)}</text>'
        )
    peak = max(points, key=lambda point: point.worst if point.worst == point.worst else math.inf)
    label = (
        f"KL of decode by position, {len(points)} ranges. Worst step {number(peak.worst)} nat, at positions "
        f"{peak.low} to {peak.high}, where the null band ends at {number(peak.band)} nat"
    )
    return Markup(
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}'
        f'<path class="null" d="{line or "M0 0"}"/><path class="axis" d="M{_LEFT} 6V{_BASE}H{_WIDTH}"/>'
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">1e{top}</text>'
        f'<text x="{_LEFT - 6}" y="{_BASE}" text-anchor="end">1e{bottom}</text></svg>'
    )


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def against_bound(statistic: Statistic) -> str:
    """A bar of the value with a tick at the bound, on a linear scale from 0 to twice the bound (an arrow: beyond).

    HTML, and not marked as such: a large run has hundreds of thousands.
    """
    bound, value = statistic.bound, statistic.value
    if not bound or not math.isfinite(bound) or not math.isfinite(value):
        return ""
    share = abs(value / bound) / 2
    arrow = '<path class="beyond" d="M112 1.5l8 6.5-8 6.5z"/>' if share > 1 else ""
    return (
        '<svg class="bar" viewBox="0 0 120 16" aria-hidden="true"><rect class="track" y="5" width="120" height="6"/>'
        f'<rect class="value" y="5" width="{120 * share if share <= 1 else 110:.1f}" height="6"/>{arrow}'
        '<path class="tick" d="M60 1v14"/></svg>'
    )


def pair(value: float, other: float | None, top: float) -> Markup:
    """A bar of `value` of `top`, and below it a thinner one of `other`, the baseline's."""

    def wide(number: float) -> float:
        return 120 * number / top if 0 <= number <= top and 0 < top < math.inf else 0.0

    below = "" if other is None else f'<rect class="other" y="10" width="{wide(other):.1f}" height="3"/>'
    return Markup(
        '<svg class="bar" viewBox="0 0 120 16" aria-hidden="true">'
        f'<rect class="value" y="3" width="{wide(value):.1f}" height="6"/>{below}</svg>'
    )


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != math.inf else None

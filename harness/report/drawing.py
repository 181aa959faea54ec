"""Small inline SVG: verdict shapes, |Δ logprob| by position, a statistic against its bound."""

from markupsafe import Markup

from harness.report.text import number
from harness.result import Difference, Statistic
from harness.verdict import Verdict

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 132, 52, 22

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


def gap(difference: Difference) -> float | None:
    """|Δ logprob| of the baseline's best token; None where the cell does not have it in its top-k."""
    if not difference.baseline:
        return None
    token, logprob = difference.baseline[0]
    other = dict(difference.candidate).get(token)
    return None if other is None else _finite(abs(other - logprob))


def gaps(differences: tuple[Difference, ...]) -> Markup:
    """|Δ logprob| of the recorded steps over their position. A hollow mark on top: token not in the cell's top-k."""
    if not differences:
        return Markup("")
    values = [gap(difference) for difference in differences]
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    positions = [difference.position for difference in differences]
    low, high = min(positions), max(positions)
    span = (high - low) or 1
    marks = []
    for difference, value in zip(differences, values, strict=True):
        share = (difference.position - low) / span if high > low else 0.5
        x = _LEFT + 8 + share * (_WIDTH - _LEFT - 20)
        y = 12 + (_HEIGHT - _BOTTOM - 12) * (1 - (1.0 if value is None else value / top))
        kind, said = ("miss", "not in the top-k") if value is None else ("hit", f"|Δ| {number(value)} nat")
        marks.append(
            Markup(
                '<path class="stem" d="M{x:.1f} {base}V{y:.1f}"/>'
                '<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            ).format(x=x, y=y, base=_HEIGHT - _BOTTOM, kind=kind)
            + Markup("<title>position {}, step {}: {}</title></circle>").format(
                difference.position, difference.step, said
            )
        )
    label = f"|Δ logprob| at {len(values)} recorded steps, positions {low} to {high}, largest {number(top)} nat"
    return Markup(
        '<svg class="plot" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">'
        '<path class="axis" d="M{left} 6V{base}H{w}"/>'
        '<text x="{tick}" y="16" text-anchor="end">{top}</text><text x="{tick}" y="{base}" text-anchor="end">0</text>'
        '<text x="{left}" y="{foot}">{low}</text><text x="{w}" y="{foot}" text-anchor="end">{high}</text>'
        '<text x="{mid}" y="{foot}" text-anchor="middle">position in the sequence</text>{marks}</svg>'
    ).format(
        w=_WIDTH, h=_HEIGHT, label=label, left=_LEFT, base=_HEIGHT - _BOTTOM, tick=_LEFT - 6, top=number(top), low=low,
        high=high, foot=_HEIGHT - 6, mid=(_WIDTH + _LEFT) // 2, marks=Markup("").join(marks),
    )  # fmt: skip


def against_bound(statistic: Statistic) -> Markup:
    """A bar of the value with a tick at the bound, on a linear scale from 0 to twice the bound (an arrow: beyond)."""
    if statistic.bound is None or not _finite(statistic.bound) or _finite(statistic.value) is None:
        return Markup("")
    share = abs(statistic.value) / abs(statistic.bound) / 2
    arrow = Markup('<path class="beyond" d="M112 1.5l8 6.5-8 6.5z"/>') if share > 1 else Markup("")
    return Markup(
        '<svg class="bar" viewBox="0 0 120 16" aria-hidden="true"><rect class="track" y="5" width="120" height="6"/>'
        '<rect class="value" y="5" width="{:.1f}" height="6"/>{}<path class="tick" d="M60 1v14"/></svg>'
    ).format(120 * share if share <= 1 else 110, arrow)


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None

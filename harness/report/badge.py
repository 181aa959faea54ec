"""The run as a badge, for a README: one line of SVG that needs no fonts and loads nothing."""

from collections import Counter

from harness.report.run import Run
from harness.verdict import TABLE, Effect, Verdict

_LABEL = "Helix"
_WIDE = 6.6  # of a letter at 11 px, in most sans fonts
#: In the order in which they are worth telling.
_COLOURS = {
    Effect.DIFFERS: "#a11318",
    Effect.INFRASTRUCTURE: "#0b566b",
    Effect.OK: "#12633a",
    Effect.NEUTRAL: "#4b5768",
}


def badge(run: Run) -> str:
    """`Helix | ✓ 47 pass` or `Helix | ✗ 2 fail, 1 xpass`: what differs if anything does, else what passed."""
    by_effect = {effect: Counter(result.verdict for result in run.with_effect(effect)) for effect in _COLOURS}
    effect, counts = next(
        ((effect, found) for effect, found in by_effect.items() if found), (Effect.NEUTRAL, Counter())
    )
    ranked = sorted(counts, key=list(Verdict).index)
    said = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ranked) or "nothing ran"
    text = f"{TABLE[ranked[0]].symbol} {said}" if ranked else said
    left, right = round(len(_LABEL) * _WIDE + 16), round(len(text) * _WIDE + 16)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{_LABEL}: {said}"><title>{_LABEL}: {said}</title><clipPath id="r"><rect width="{left + right}" '
        f'height="20" rx="4"/></clipPath><g clip-path="url(#r)"><rect width="{left}" height="20" fill="#33373e"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{_COLOURS[effect]}"/></g><g fill="#fff" '
        'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2}" y="14">{_LABEL}</text><text x="{left + right / 2}" y="14">{text}</text></g></svg>\n'
    )

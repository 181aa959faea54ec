"""A chart with logarithmic axes as an SVG that reads well on light and dark pages. No dependency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 54
_COLOURS = ("#1b7f5c", "#b4532a", "#4a5fc1", "#8a6d1f")
_MARKS = ("", "6 4", "2 3", "8 3 2 3")
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#8883}.a{stroke:#888}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


@dataclass(frozen=True)
class Line:
    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Both axes are logarithmic; all values are above 0."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]

    def svg(self) -> str:
        xs = [value for line in self.lines for value in line.xs]
        ys = [value for line in self.lines for value in line.ys]
        across, up = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style>",
            f'<text class="t" x="{LEFT}" y="20">{escape(self.title)}</text>',
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(self.x)}</text>',
            f'<text x="{LEFT}" y="{TOP - 8}" text-anchor="end">{escape(self.y)}</text>',
        ]
        for value in across.ticks():
            at = across.place(value)
            parts.append(f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>')
        for value in up.ticks():
            at = up.place(value)
            parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        for number, line in enumerate(self.lines):
            colour, dashes = _COLOURS[number % 4], _MARKS[number % 4]
            path = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
            stroke = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"'
            parts.append(f'<polyline fill="none" {stroke} points="{path}"/>')
            at = TOP + 16 + 18 * number
            parts.append(f'<line x1="{WIDTH - 190}" x2="{WIDTH - 164}" y1="{at - 4}" y2="{at - 4}" {stroke}/>')
            parts.append(f'<text x="{WIDTH - 158}" y="{at}">{escape(line.name)}</text>')
        return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        low, high = math.log10(self.low), math.log10(self.high)
        share = (math.log10(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2, 5 of every decade that lie on the axis, thinned to at most eight."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        kept = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        return kept if len(kept) <= 8 else [value for value in kept if f"{value:e}".startswith("1.")]


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"

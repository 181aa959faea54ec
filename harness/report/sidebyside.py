"""The steps at which a cell and its baseline differ, token by token, with the top-k of both."""

from dataclasses import dataclass

from markupsafe import Markup

from harness.plain import quoted
from harness.report import drawing
from harness.report.text import escaped, number
from harness.result import Difference


@dataclass(frozen=True)
class SideBySide:
    """One step. `rows` are table cells: the baseline's token and logprob; the cell's token, logprob and Δ."""

    prompt: str
    step: int
    position: int
    gap: str
    swapped: bool  # the best tokens differ
    first: bool  # the earliest recorded step whose best tokens differ
    rows: Markup


def side_by_side(differences: tuple[Difference, ...]) -> list[SideBySide]:
    """All recorded steps, in the ledger's order: the worst first."""
    swaps = [(one.prompt, one.step) for one in differences if _swapped(one)]
    first = min(swaps, key=lambda found: found[1], default=None)
    return [_one(one, (one.prompt, one.step) == first) for one in differences]


def _swapped(difference: Difference) -> bool:
    return (
        bool(difference.baseline and difference.candidate) and difference.baseline[0][0] != difference.candidate[0][0]
    )


def _one(difference: Difference, first: bool) -> SideBySide:
    gap = drawing.gap(difference)
    return SideBySide(
        prompt=difference.prompt,
        step=difference.step,
        position=difference.position,
        gap="baseline's token is not in the cell's top-k" if gap is None else f"|Δ logprob| {number(gap)} nat",
        swapped=_swapped(difference),
        first=first,
        rows=_rows(difference),
    )


def _rows(difference: Difference) -> Markup:
    """All but the texts are numbers, and need no escape."""
    said = escaped([quoted(text) for _, text in difference.texts])
    shown = {
        token: f'<span class="said">{text}</span> {token}'
        for (token, _), text in zip(difference.texts, said, strict=True)
    }
    here, there = dict(difference.baseline), dict(difference.candidate)

    def entry(token: int, logprob: float, other: dict[int, float]) -> str:
        lone = "" if token in other else " lone"
        return f'<td class="n{lone}">{shown.get(token, token)}</td><td class="n">{logprob:.4f}</td>'

    lines = []
    for place in range(max(len(difference.baseline), len(difference.candidate))):
        line = "<tr>"
        line += entry(*difference.baseline[place], there) if place < len(difference.baseline) else "<td></td><td></td>"
        if place < len(difference.candidate):
            token, logprob = difference.candidate[place]
            delta = f"{logprob - here[token]:+.4f}" if token in here else "only here"
            line += f'{entry(token, logprob, here)}<td class="n">{delta}</td>'
        else:
            line += "<td></td><td></td><td></td>"
        lines.append(line + "</tr>")
    return Markup("".join(lines))

"""The run as Markdown, for a pull request or a CI page."""

import re

import pandas as pd

from harness.report.compare import TITLES, Comparison
from harness.report.page import headline, lede
from harness.report.run import Run
from harness.report.square import COLUMNS, Matrix, Square, matrices, severity
from harness.report.text import clean, plural
from harness.result import CellResult
from harness.verdict import TABLE, Effect, Verdict

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
_LISTED = 20


def summary(run: Run, table: pd.DataFrame, since: Comparison | None = None) -> str:
    """Headline, what changed since the last run, matrix, and what differs.

    Text of the ledger is escaped: it makes no link, mention or table cell.
    """
    results = {result.cell.id: result for result in run.results}
    parts = [f"## Helix: {headline(run)}", f"{lede(run)} Run {plain(run.name)}, exit status {run.exit_status}."]
    gone = [result for result in run.results if result.verdict is Verdict.XPASS]
    if gone:
        names = ", ".join(plain(result.cell.id) for result in gone[:_LISTED])
        told = plural(len(gone), "known limitation")
        parts.append(f"**{TABLE[Verdict.XPASS].symbol} XPASS: {told} gone. Update the declared table:** {names}")
    parts += [changes(since).rstrip()] if since else []
    parts += [_matrix(matrix) for matrix in matrices(table, results)]
    for title, effect in (("What differs, and why", Effect.DIFFERS), ("Could not be judged", Effect.INFRASTRUCTURE)):
        found = sorted(run.with_effect(effect), key=lambda result: severity(result.declared, result.verdict))
        if found:
            more = [f"- and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
            parts.append("\n".join([f"### {title}", "", *map(_line, found[:_LISTED]), *more]))
    if run.left_out or run.unfinished:
        said = [plural(len(run.left_out), "ledger record") + " could not be used"] if run.left_out else []
        said += [plural(len(run.unfinished), "planned cell") + " without a result"] if run.unfinished else []
        parts.append(f"Left out: {'; '.join(said)}.")
    return "\n\n".join(parts) + "\n"


def changes(found: Comparison, most: int | None = _LISTED) -> str:
    """What changed between two runs: the sentence, then the movers, at most `most` in each direction."""
    lines = [f"### Since {plain(found.before.name)}: {plain(found.sentence)}", ""]
    for direction, title in TITLES.items():
        moves = found.of(direction)[:most]
        lines += [f"**{title}**", ""] if moves else []
        for move in moves:
            was, now = move.before.verdict, move.after.verdict
            lines.append(
                f"- {TABLE[was].symbol} {was} → {TABLE[now].symbol} **{now}** {plain(move.after.id)}: "
                f"{plain(move.after.reason[:300])}"
            )
        lines += [""] if moves else []
    for one in found.excluded:
        if one.broken:
            said = f"{plural(len(one.cells), 'cell')} could no longer be judged: {plain(one.reason[:300])}"
            lines.append(f"- {said}")
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """`text` as one line of Markdown that means nothing but itself."""
    line = " ".join(clean(text).split())
    return _SPECIAL.sub(r"\\\1", line).replace("@", "@\u200b").replace("://", ":\u200b//")


def _matrix(matrix: Matrix) -> str:
    heads = [f"{plain(name)}: {column}" for name in matrix.hardware for column in COLUMNS]
    lines = [f"| {matrix.kind} backend | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    lines += [f"| {plain(backend)} | " + " | ".join(map(_square, line)) + " |" for backend, line in matrix.rows]
    return "\n".join(lines)


def _square(square: Square | None) -> str:
    if square is None:
        return ""
    said = f"{TABLE[square.verdict].symbol} {square.verdict}, {plain(square.note)}"
    return f"**{said}, {square.standing}**" if square.disagrees else said


def _line(result: CellResult) -> str:
    return (
        f"- {TABLE[result.verdict].symbol} **{result.verdict}** (declared {result.declared}) "
        f"{plain(result.cell.id)}: {plain(result.reason[:500])}"
    )

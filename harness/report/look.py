"""`python -m harness report|compare|history`: what past runs say, in a terminal or for programs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import ledger
from harness.frozen import Frozen
from harness.report.compare import TITLES, Comparison, Direction, Move, compare
from harness.report.history import History, find_runs, previous, tracks
from harness.report.markdown import changes
from harness.report.store import Stored, stored
from harness.report.text import clean, number, plural
from harness.suite import REPORTS
from harness.verdict import TABLE

USAGE = 2
_LISTED = 20


class NoSuchRun(ValueError):
    """The text says which runs there are."""


def compare_main(argv: Sequence[str]) -> int:
    """Exit status 0: nothing got worse; 1: something did, or a known limitation is gone; 2: bad usage."""
    parser = _parser("compare", "What changed between two runs: movers ranked, new, gone, excluded with reasons.")
    parser.add_argument("before", nargs="?", default="previous", help="a run (default: the one before AFTER)")
    parser.add_argument("after", nargs="?", default="last", help="a run (default: last)")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    parser.add_argument("--all", action="store_true", help=f"every line, not the first {_LISTED} of each part")
    options = parser.parse_args(argv)
    try:
        runs = find_runs(options.reports)
        after = find(options.after, runs)
        before = find(options.before, runs, after)
    except NoSuchRun as problem:
        return _complain(str(problem))
    found = compare(before, after)
    if options.format == "json":
        print(json.dumps(_as_json(found), indent=2))
    elif options.format == "markdown":
        print(changes(found, None if options.all else _LISTED), end="")
    else:
        print("\n".join(as_text(found, None if options.all else _LISTED)))
    return 1 if found.of(Direction.WORSE) or found.of(Direction.XPASS) else 0


def history_main(argv: Sequence[str]) -> int:
    """Exit status 0; 2: bad usage, or no cell matches."""
    parser = _parser("history", "Each cell over all runs, the oldest left, with its last good and first bad run.")
    parser.add_argument("cell", nargs="?", metavar="GLOB", help="cells by id (default: those whose verdict changed)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    found = tracks(find_runs(options.reports), options.cell or "*")
    if not found.runs:
        return _complain(f"no run in {options.reports}; start one: ./test_helix.sh --all")
    chosen = [track for track in found.tracks.values() if options.cell or track.news]
    if options.cell and not chosen:
        return _complain(f"no cell of {plural(len(found.runs), 'run')} matches {options.cell!r}")
    if options.format == "json":
        names = [run.name for run in found.runs]
        print(json.dumps({"runs": names, "cells": [track.model_dump(mode="json") for track in chosen]}, indent=2))
        return 0
    print("\n".join(_history_lines(found, chosen)))
    return 0


def report_main(argv: Sequence[str]) -> int:
    """Exit status 0; 2: no such run."""
    from harness import report

    parser = _parser("report", "Draw runs again from their ledgers, and the index over all runs.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs to draw (default: the index only)")
    options = parser.parse_args(argv)
    try:
        folders = [find(name, find_runs(options.reports)).folder for name in options.runs]
    except NoSuchRun as problem:
        return _complain(str(problem))
    for folder in folders:
        print(report.write(folder, options.reports))
    print(report.index(options.reports))
    return 0


def find(name: str, runs: Sequence[Stored], after: Stored | None = None) -> Stored:
    """A run by `last`, `previous`, folder, ledger, name or the start of it. NoSuchRun says what there is."""
    if name == "last" and runs:
        return runs[-1]
    if name == "previous" and after is not None:
        if found := previous(runs, after.folder):
            return found
        raise NoSuchRun(f"no earlier run judged a cell of {after.name}; name the run to compare with")
    path = Path(name)
    folder = path.parent if path.name in (ledger.NAME, ledger.PACKED) else path
    if ledger.find(folder).is_file():
        return stored(folder)
    names = [(one, {one.header.run, one.folder.name}) for one in runs]
    exact = [one for one, called in names if name in called]
    found = exact or [one for one, called in names if any(word.startswith(name) for word in called)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(clean(one.folder.name) for one in (found or runs)[-8:]) or "none"
    raise NoSuchRun(f"{name!r} {'is the start of several runs' if found else 'is no run'}; the latest are: {known}")


def as_text(found: Comparison, most: int | None = _LISTED) -> list[str]:
    """The comparison for a terminal, at most `most` lines of each part."""
    lines = [f"{_named(found.before)}  →  {_named(found.after)}", clean(found.sentence)]
    for direction, title in TITLES.items():
        moves = found.of(direction)
        lines += _part(title, [_move_lines(move) for move in moves], most)
    lines += _part(
        "Same verdict, other numbers",
        [
            [f"{one.name}: {one.was} → {one.now} (× {number(one.factor)})  {clean(one.after.id)}"]
            for one in found.numbers
        ],
        most,
    )
    fresh = [[f"{TABLE[one.verdict].symbol} {one.verdict:<8}  {clean(one.id)}"] for one in found.new]
    lines += _part("New", fresh, most)
    lines += _part(f"Gone: {found.gone_why}", [[clean(one.id)] for one in found.gone], most)
    reasons = [
        [f"{'! ' if one.broken else ''}{plural(len(one.cells), 'cell')}: {clean(one.reason)}"]
        + [f"    {clean(cell_id)}" for cell_id in (one.cells if one.broken or most is None else ())]
        for one in found.excluded
    ]
    return lines + _part("Excluded: the pair says nothing about them", reasons, most)


def _part(title: str, entries: list[list[str]], most: int | None) -> list[str]:
    if not entries:
        return []
    shown = [f"  {line}" for entry in entries[:most] for line in entry]
    more = [f"  … and {len(entries) - most} more (--all)"] if most is not None and len(entries) > most else []
    return ["", f"{title} ({len(entries)})", *shown, *more]


def _move_lines(move: Move) -> list[str]:
    was, now = move.before, move.after
    words = f"{TABLE[was.verdict].symbol} {was.verdict} → {TABLE[now.verdict].symbol} {now.verdict}"
    lines = [f"{words:<24}  {clean(now.id)}", f"    {clean(now.reason)}"]
    if was.declared is not now.declared:
        lines.append(f"    declared {was.declared} → {now.declared}")
    return lines + [f"    asked otherwise: {clean(said)}" for said in move.asked]


def _history_lines(found: History, chosen: list) -> list[str]:
    names = [clean(run.name) for run in found.runs]
    lines = [f"{place:>3}  {name}" for place, name in enumerate(names, start=1)]
    if not chosen:
        return [*lines, "", f"No verdict changed in {plural(len(names), 'run')}."]
    for track in chosen:
        by_place = dict(track.verdicts)
        strip = "".join(TABLE[by_place[place]].symbol if place in by_place else " " for place in range(len(names)))
        lines += ["", clean(track.id), f"    |{strip}|  {track.verdicts[-1][1]} in {names[track.verdicts[-1][0]]}"]
        if track.first_bad is not None:
            good = names[track.last_good] if track.last_good is not None else "none"
            lines.append(f"    first bad: {names[track.first_bad]}; last good: {good}")
        if track.gone is not None:
            lines.append(f"    XPASS, a known limitation is gone since {names[track.gone]}: update the declared table")
    shapes = "  ".join(f"{meaning.symbol} {verdict}" for verdict, meaning in TABLE.items())
    return [*lines, "", shapes]


def _named(run: Stored) -> str:
    return clean(run.name) + (f" ({clean(run.header.started[:16])})" if run.header.started else "")


def _as_json(found: Comparison) -> dict:
    """The comparison for programs: runs by name instead of by file."""

    def short(value: Frozen) -> dict:
        return value.model_dump(mode="json")

    return {
        "before": found.before.name,
        "after": found.after.name,
        "sentence": found.sentence,
        "movers": [short(one) for one in found.movers],
        "numbers": [short(one) for one in found.numbers],
        "new": [one.id for one in found.new],
        "gone": [one.id for one in found.gone],
        "gone_why": found.gone_why,
        "excluded": [short(one) for one in found.excluded],
        "same": found.same,
    }


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m harness {name}", description=about, allow_abbrev=False)
    parser.add_argument("--reports", type=Path, default=REPORTS, metavar="DIR", help="the folder of runs")
    return parser


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE

"""`python -m harness issue`: one GitHub issue for the cells whose verdict changed, with first bad and last good.

It is opened when a cell gets bad, told what moved each night, and closed when no cell is bad. A bad cell that is
planned no longer (`harness.report.planned`) is told apart, and keeps nothing open. A night's folder may hold what
`python -m harness surface` said of vLLM's nightly build (`surface.txt`): what changed there is told too, and keeps the
issue open. `gh` does the writing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.frozen import Frozen
from harness.report.history import History, Track, find_runs, tracks
from harness.report.markdown import plain
from harness.report.planned import last_without
from harness.report.text import plural
from harness.suite import REPORTS
from harness.verdict import TABLE

LABEL = "helix-nightly"
TITLE = "Nightly: what is not as declared"
SURFACE = "surface.txt"
USAGE = 2
INFRASTRUCTURE = 3
#: A body of GitHub's holds 65,536 characters.
_LISTED = 150
_SURFACE_LINES = 40

#: Runs `gh` with these words and standard input; returns standard output. Raises CalledProcessError.
Gh = Callable[[Sequence[str], str], str]


class Change(Frozen):
    """A cell that the latest run judged otherwise than the last run before it that judged it. `was`: "" for new."""

    track: Track
    was: str
    now: str


class Surface(Frozen):
    """What the latest night with an answer says of the coupling surface. `moved`: that is the latest run, and the
    answer before it was another."""

    night: str
    lines: tuple[str, ...]
    moved: bool

    @property
    def bad(self) -> bool:
        return bool(_changes(self.lines))

    @property
    def body(self) -> str:
        more = [f"and {len(self.lines) - _SURFACE_LINES} more lines"] if len(self.lines) > _SURFACE_LINES else []
        told = ["```", *self.lines[:_SURFACE_LINES], *more, "```"]
        return "\n".join(
            [f"What the plugin hooks in vLLM's nightly build, read in {plain(self.night)}:", "", *told, ""]
        )


class News(Frozen):
    """What the issue says: `bad` cells with their first bad run, and what `changed` with the latest run. `left`: bad
    when last run, and planned no longer, with the run (a place in `history.runs`) that shows it."""

    bad: tuple[Track, ...]
    left: tuple[tuple[Track, int], ...]
    changed: tuple[Change, ...]
    history: History
    surface: Surface | None = None

    @property
    def open(self) -> bool:
        """Whether there is something for the issue to be about."""
        return bool(self.bad) or (self.surface is not None and self.surface.bad)

    @property
    def moved(self) -> bool:
        """Whether the latest run brought something to comment."""
        return bool(self.changed) or (self.surface is not None and self.surface.moved)

    @property
    def body(self) -> str:
        """The issue's text: every bad cell, as it stands after the latest run."""
        names = [run.name for run in self.history.runs]
        lines = [f"After {plain(names[-1])}: {plural(len(self.bad), 'cell')} not as declared.", ""]
        if self.bad:
            lines += ["| cell | declared | verdict | first bad | last good |", "| --- | --- | --- | --- | --- |"]
        for track in self.bad[:_LISTED]:
            verdict = track.verdicts[-1][1]
            good = plain(names[track.last_good]) if track.last_good is not None else "none"
            bad = plain(names[track.first_bad])
            told = f"{track.declared} | {TABLE[verdict].symbol} {verdict} | {bad} | {good}"
            lines.append(f"| {plain(track.id)} | {told} |")
        lines += [f"and {len(self.bad) - _LISTED} more"] if len(self.bad) > _LISTED else []
        if self.left:
            lines += ["", f"### Planned no longer: {plural(len(self.left), 'cell')}, bad when last run", ""]
            lines += ["| cell | declared | verdict | last run | not planned in |", "| --- | --- | --- | --- | --- |"]
        for track, without in self.left[: max(0, _LISTED - len(self.bad))]:
            place, verdict = track.verdicts[-1]
            told = f"{TABLE[verdict].symbol} {verdict} | {plain(names[place])} | {plain(names[without])}"
            lines.append(f"| {plain(track.id)} | {track.declared} | {told} |")
        lines += ["", self.surface.body] if self.surface else []
        return "\n".join([*lines, "", "Locally: `python -m harness history`", ""])

    @property
    def comment(self) -> str:
        """What moved with the latest run."""
        lines = [f"{plain(self.history.runs[-1].name)}: {plural(len(self.changed), 'cell')} changed the verdict.", ""]
        lines += [
            f"- {change.was or 'new'} → **{change.now}** (declared {change.track.declared}) {plain(change.track.id)}"
            for change in self.changed[:_LISTED]
        ]
        lines += ["", self.surface.body] if self.surface and self.surface.moved else []
        return "\n".join([*lines, ""])


def news_of(history: History) -> News:
    """What there is to say after the latest of `history.runs`."""
    latest = len(history.runs) - 1
    ever = [track for track in history.tracks.values() if track.first_bad is not None]
    without = last_without(history, ever)
    bad = tuple(track for track in ever if track.id not in without)
    left = tuple((track, without[track.id]) for track in ever if track.id in without)
    changed = []
    for track in history.tracks.values():
        judged = [(place, verdict) for place, verdict in track.verdicts if _judged(track, place)]
        if not judged or judged[-1][0] != latest:
            continue
        was = str(judged[-2][1]) if len(judged) > 1 else ""
        now = str(judged[-1][1])
        if (was and was != now) or (not was and track.first_bad == latest):
            changed.append(Change(track=track, was=was, now=now))
    return News(bad=bad, left=left, changed=tuple(changed), history=history, surface=surface_of(history))


def surface_of(history: History) -> Surface | None:
    """From the folders of `history.runs`; None where no night has an answer."""
    answers = [(run, run.folder / SURFACE) for run in history.runs if (run.folder / SURFACE).is_file()]
    if not answers:
        return None
    read = [tuple(file.read_text(errors="replace").splitlines()) for _, file in answers[-2:]]
    run, lines = answers[-1][0], read[-1]
    before = _changes(read[0]) if len(read) > 1 else ()
    return Surface(night=run.name, lines=lines, moved=run is history.runs[-1] and _changes(lines) != before)


def _changes(lines: Sequence[str]) -> tuple[str, ...]:
    """All but the last line, which counts, and names a version that is another one each night."""
    return tuple(line for line in lines if line.startswith(("✗ ", "    ")))


def _judged(track: Track, place: int) -> bool:
    """Whether that run said something of the cell itself; a skip or an error of the host does not."""
    verdict = dict(track.verdicts)[place]
    return TABLE[verdict].effect in ("ok", "differs")


def publish(news: News, gh: Gh, repository: str) -> str:
    """Open, update or close the issue; returns what was done, in a sentence."""
    where = ["--repo", repository]
    listed = gh(["issue", "list", *where, "--label", LABEL, "--state", "open", "--json", "number"], "")
    numbers = sorted(issue["number"] for issue in json.loads(listed or "[]"))
    if not numbers:
        if not news.open:
            return "nothing is bad, and no issue is open"
        gh(["label", "create", LABEL, *where, "--force", "--description", "kept by the nightly run"], "")
        text = f"{news.body}\n{news.comment}" if news.changed else news.body
        return gh(["issue", "create", *where, "--label", LABEL, "--title", TITLE, "--body-file", "-"], text).strip()
    number = str(numbers[0])
    gh(["issue", "edit", number, *where, "--body-file", "-"], news.body)
    if news.moved:
        gh(["issue", "comment", number, *where, "--body-file", "-"], news.comment)
    if not news.open:
        gh(["issue", "close", number, *where, "--comment", "Nothing that is planned is bad any more."], "")
        return f"closed #{number}"
    return f"updated #{number}: {plural(len(news.changed), 'cell')} changed"


def main(argv: Sequence[str]) -> int:
    """Exit status 2: no runs; 3: `gh` failed."""
    parser = argparse.ArgumentParser(prog="python -m harness issue", description=__doc__, allow_abbrev=False)
    parser.add_argument("--reports", type=Path, default=REPORTS, metavar="DIR", help="the folder of runs")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="where the issue is; without it, it is printed")
    options = parser.parse_args(argv)
    runs = find_runs(options.reports)
    if not runs:
        print(f"issue: error: no run in {options.reports}", file=sys.stderr)
        return USAGE
    news = news_of(tracks(runs))
    if not options.repository:
        print(f"{news.body}\n{news.comment}", end="")
        return 0
    try:
        print(publish(news, _gh, options.repository))
    except (OSError, subprocess.CalledProcessError) as problem:
        print(f"issue: gh failed: {getattr(problem, 'stderr', '') or problem}", file=sys.stderr)
        return INFRASTRUCTURE
    return 0


def _gh(words: Sequence[str], text: str) -> str:
    return subprocess.run(["gh", *words], input=text, capture_output=True, text=True, check=True).stdout

"""What a run shows while it goes on: a live table on a terminal, plain lines elsewhere.

Both read the run's own folder: the ledger, where every step is written before the next one is taken, and the files that
a cell's server leaves. So nothing that runs waits for what is shown.
"""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from harness import ledger
from harness.cell import Cell
from harness.matrix import PlannedCell
from harness.plain import clean, plural
from harness.verdict import TABLE, Effect, Verdict, effect_of

Progress = Callable[[str], None]

_READY = b"Application startup complete"  # the last line of a server's start
_FINISHED = 8  # finished cells that stay in the table
_STYLES = {Effect.OK: "green", Effect.DIFFERS: "bold red", Effect.INFRASTRUCTURE: "cyan", Effect.NEUTRAL: "dim"}


class Done(NamedTuple):
    """One finished cell. `seconds` is the sum of its phases, 0 where nothing was started."""

    verdict: Verdict
    effect: Effect
    seconds: float


class Follower:
    """A run so far, from its ledger. `read` takes what was written since; a line that is being written waits."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic):
        self.path = run_dir / ledger.NAME
        self.clock = clock
        self._offset = 0
        self.running: dict[str, float] = {}  # id -> when it was seen to start
        self.done: dict[str, Done] = {}  # id -> how it ended, the latest last

    def read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for line in text[:whole].splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # the report says what could not be read

    def _take(self, event: dict) -> None:
        if event["event"] == "run-start":
            self.running.clear()  # what a run that was cut off had started
        elif event["event"] == "cell-start":
            self.running[event["id"]] = self.clock()
        elif event["event"] == "result":
            result = event["result"]
            verdict = Verdict(result["verdict"])
            cell_id = Cell.model_validate(result["cell"]).id
            self.running.pop(cell_id, None)
            self.done.pop(cell_id, None)
            seconds = sum(phase["seconds"] for phase in result["phases"])
            self.done[cell_id] = Done(verdict, effect_of(Verdict(result["declared"]), verdict), seconds)


class TimeLeft:
    """How long the rest of a run takes, by how long its cells took before.

    `known`: seconds of each cell in past runs. A cell that never ran takes as long as the median of those that ran now,
    or else of all that are known.
    """

    def __init__(self, plan: Sequence[PlannedCell], jobs: int, known: Mapping[str, float]):
        self.ids = [item.cell.id for item in plan if item.skip is None]
        self.jobs = jobs
        self.known = known

    def of(self, cell_id: str, seen: Follower) -> float | None:
        """Seconds that a cell is expected to take; None where nothing ever ran."""
        if cell_id in self.known:
            return self.known[cell_id]
        now = [done.seconds for done in seen.done.values() if done.seconds > 0]
        ran = now or list(self.known.values())
        return statistics.median(ran) if ran else None

    def left(self, seen: Follower) -> float | None:
        """Seconds until all have ended, `jobs` at a time; None where nothing ever ran."""
        total = 0.0
        for cell_id in self.ids:
            if cell_id in seen.done:
                continue
            expected = self.of(cell_id, seen)
            if expected is None:
                return None
            elapsed = seen.clock() - seen.running[cell_id] if cell_id in seen.running else 0.0
            total += max(expected - elapsed, 0.0)
        return total / self.jobs

    def said(self, seen: Follower) -> str:
        """`12 of 59 cells, about 14 min left`."""
        ended = sum(cell_id in seen.done for cell_id in self.ids)
        left = self.left(seen)
        return f"{ended} of {plural(len(self.ids), 'cell')}" + (f", about {duration(left)} left" if left else "")


def duration(seconds: float) -> str:
    """`40 s`, `14 min`, `2 h 05 min`: as precise as a guess may be."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def doing(folder: Path) -> str:
    """What the cell of `folder` is at, by the files that are there."""
    log = folder / "server.log"
    if (folder / "capture").is_dir():
        return "finding where it differs"
    if (folder / "transcript.json").exists():
        return "stopping, judging"
    try:
        return "answering" if _READY in log.read_bytes() else "starting"
    except OSError:  # not there yet
        return "making the model"


class Plain:
    """One line a step, at once; after each cell that ended, how many are left and for how long."""

    def __init__(self, follower: Follower, left: TimeLeft):
        self.follower, self.left = follower, left
        self._ended = 0

    def __call__(self, line: str) -> None:
        self.follower.read()
        ended = sum(done.effect is not Effect.NEUTRAL for done in self.follower.done.values())
        more = f"  ({self.left.said(self.follower)})" if ended > self._ended else ""
        self._ended = ended
        print(clean(line) + more, flush=True)


class Board:
    """The live table: what runs, what each cell is doing, what ended last, the counts and the time left."""

    def __init__(self, follower: Follower, left: TimeLeft, folders: Mapping[str, Path]):
        self.follower, self.left, self.folders = follower, left, folders

    def __rich__(self) -> Table:
        seen = self.follower
        seen.read()
        look = {"box": None, "expand": True, "pad_edge": False, "padding": (0, 2, 0, 0)}
        table = Table(**look, caption=self._foot(), caption_justify="left")
        table.add_column("", no_wrap=True, width=12)
        table.add_column("cell", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("doing", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        ended = [(name, done) for name, done in seen.done.items() if done.effect is not Effect.NEUTRAL]
        for name, done in ended[-_FINISHED:]:
            word = f"[{_STYLES[done.effect]}]{TABLE[done.verdict].symbol} {done.verdict}[/]"
            table.add_row(word, escape(clean(name)), "", duration(done.seconds) if done.seconds else "")
        for name, began in seen.running.items():
            expected = self.left.of(name, seen)
            time_ = duration(seen.clock() - began) + (f" of {duration(expected)}" if expected else "")
            table.add_row("[bold]· running[/]", escape(clean(name)), doing(self.folders[name]), time_)
        return table

    def _foot(self) -> str:
        counts = Counter(done.verdict for done in self.follower.done.values())
        words = "   ".join(f"{TABLE[one].symbol} {counts[one]} {one}" for one in Verdict if counts[one])
        return f"\n{self.left.said(self.follower)}   {words}"


@contextmanager
def shown(
    run_dir: Path,
    plan: Sequence[PlannedCell],
    jobs: int,
    known: Mapping[str, float],
    folders: Mapping[str, Path],
    console: Console | None = None,
) -> Iterator[Progress]:
    """A callable for the lines of the runner, for as long as it runs.

    `known`: seconds of each cell in past runs. `folders`: where each cell's server writes.
    """
    console = console or Console(file=sys.stdout)
    follower, left = Follower(run_dir), TimeLeft(plan, jobs, known)
    if not console.is_terminal:
        yield Plain(follower, left)
        return
    verdicts = tuple(f"{verdict:<8}" for verdict in Verdict)

    def say(line: str) -> None:
        """Only what the table does not show."""
        if not line.startswith(("start ", *verdicts)):
            console.print(clean(line), markup=False, highlight=False)

    with Live(Board(follower, left, folders), console=console, refresh_per_second=2, transient=True):
        yield say

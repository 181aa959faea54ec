"""What the page knows of earlier runs: what changed since each, and every cell's verdicts so far."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from harness import ledger
from harness.report.compare import Comparison, compare
from harness.report.history import find_runs, previous, tracks
from harness.report.store import Stored, stored
from harness.report.text import fragment
from harness.verdict import Verdict

#: This many earlier runs can be compared with in the page, and stand in a cell's history.
_COMPARED = 8
_REMEMBERED = 20


@dataclass(frozen=True)
class Seen:
    """A cell's verdict in one run."""

    verdict: Verdict
    run: str
    started: str
    href: str  # the cell in that run's page; empty for this run


@dataclass(frozen=True)
class CellPast:
    """A cell over the runs up to this one, oldest first; the runs named as in `history.Track`."""

    seen: tuple[Seen, ...]
    last_good: Seen | None
    first_bad: Seen | None
    gone: Seen | None

    @property
    def since(self) -> str:
        """The run since which the cell has been bad, where that is not this run."""
        return self.first_bad.run if self.first_bad and self.first_bad.href else ""


@dataclass(frozen=True)
class Past:
    changes: tuple[Comparison, ...]  # with the run that this one is best compared with, then with others, latest first
    cells: dict[str, CellPast]


NOTHING = Past(changes=(), cells={})


def past_of(run_dir: Path, reports: Path | None = None) -> Past:
    """The earlier runs in `reports`; without that, in the folder of runs that `run_dir` lies in, if it is one.

    Committed evidence (`reports/NAME`) is compared with committed evidence only: others have not the local runs.
    """
    if reports is None and run_dir.parent.name == "runs":
        reports = run_dir.parent.parent
    if reports is None:
        return NOTHING
    here = stored(run_dir)
    others = [one for one in find_runs(reports) if one.folder.resolve() != run_dir.resolve()]
    if run_dir.resolve().parent == reports.resolve():
        others = [one for one in others if one.folder.parent == reports]
    place = (here.header.started, here.header.run)
    runs = [*[one for one in others if (one.header.started, one.header.run) < place][-_REMEMBERED + 1 :], here]
    if len(runs) == 1 or not ledger.find(run_dir).is_file():
        return NOTHING
    best = previous(runs, run_dir)
    if best is None:
        return NOTHING
    rest = [one for one in reversed(runs[:-1]) if one is not best][: _COMPARED - 1]
    return Past(changes=tuple(compare(one, here) for one in (best, *rest)), cells=_cells(runs, here))


def _cells(runs: list[Stored], here: Stored) -> dict[str, CellPast]:
    pages = [_page(one, here) for one in runs]
    found = {}
    for cell_id, track in tracks(runs).tracks.items():
        address = fragment(cell=cell_id)
        seen = {
            place: Seen(
                verdict=verdict,
                run=runs[place].name,
                started=runs[place].header.started,
                href=f"{pages[place]}#{address}" if pages[place] else "",
            )
            for place, verdict in track.verdicts
        }
        found[cell_id] = CellPast(
            seen=tuple(seen.values()),
            last_good=seen.get(track.last_good),
            first_bad=seen.get(track.first_bad),
            gone=seen.get(track.gone),
        )
    return found


def _page(run: Stored, here: Stored) -> str:
    """The run's page as seen from this one's folder; empty for this run itself."""
    if run is here:
        return ""
    return quote(Path(os.path.relpath(run.folder, here.folder)).as_posix()) + "/index.html"

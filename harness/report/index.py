"""The index over runs: `reports/index.html`, over committed evidence and local runs."""

from itertools import compress
from pathlib import Path
from urllib.parse import quote

from harness import ledger
from harness.frozen import Frozen
from harness.report.history import History, Track, find_runs, tracks
from harness.report.naming import Name
from harness.report.page import headline, lede, tally
from harness.report.run import Run, load
from harness.report.template import asset, environment, script_hash
from harness.report.text import clean, fragment, legal
from harness.verdict import Verdict

#: Runs and cells of the grid of what changed.
_COLUMNS, _ROWS = 20, 60


class Line(Frozen):
    """One run in the index; also evidence of another kind, which has a README and no ledger."""

    name: str
    href: str  # empty: the run has no page yet
    started: str = ""
    hardware: tuple[str, ...] = ()
    headline: str
    lede: str = ""
    counts: tuple[tuple[Verdict, int], ...] = ()
    exit_status: int | None = None
    left_out: int = 0


class Mark(Frozen):
    """One cell in one run of the grid."""

    verdict: Verdict
    href: str
    run: str


class Changed(Frozen):
    """A cell whose verdict changed, or that is bad now, over the grid's runs; None: the run had no such cell."""

    id: str
    name: Name
    marks: tuple[Mark | None, ...]
    first_bad: str
    last_good: str
    gone: str  # the run that first found a known limitation gone


def index(reports_dir: Path) -> Path:
    """Write `reports_dir/index.html`, newest first: `reports_dir/*/` is committed, `reports_dir/runs/*/` is local."""
    committed = _lines(reports_dir, reports_dir)
    local = _lines(reports_dir / "runs", reports_dir)
    sections = [("Committed evidence", committed), ("Runs on this machine", local)]
    found = tracks(find_runs(reports_dir))
    hrefs = [_href(run.folder, reports_dir) for run in found.runs]
    grid = _grid(found, hrefs)
    columns = list(zip([run.name for run in found.runs], hrefs, strict=True))[-_COLUMNS:]
    told = [any(row.marks[place] for row in grid[:_ROWS]) for place in range(len(columns))]
    rows = [row.model_copy(update={"marks": tuple(compress(row.marks, told))}) for row in grid[:_ROWS]]
    script = asset("index.js")
    text = environment().get_template("index.html.j2").render(
        sections=sections,
        count=len(found.runs),
        runs=list(compress(columns, told)),  # those that have one of these cells
        grid=rows,
        more=max(0, len(grid) - _ROWS),
        script=script,
        script_hash=script_hash(script),
    )  # fmt: skip
    scratch = reports_dir / ".index.html.tmp"
    scratch.write_text(legal(text), encoding="utf-8")
    return scratch.replace(reports_dir / "index.html")


def _lines(folder: Path, root: Path) -> list[Line]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [_line(path, root) for path in folders if ledger.find(path).is_file()]
    found += [
        _other(path, root) for path in folders if not ledger.find(path).is_file() and (path / "README.md").is_file()
    ]
    return sorted(found, key=lambda line: (line.started or line.name, line.name), reverse=True)


def _line(run_dir: Path, root: Path) -> Line:
    run: Run = load(run_dir)
    return Line(
        name=run_dir.name,
        href=_href(run_dir, root),
        started=run.started,
        hardware=run.hardware,
        headline=headline(run),
        lede=lede(run),
        counts=tuple(tally(run)),
        exit_status=run.exit_status if run.results else None,
        left_out=len(run.left_out) + len(run.unfinished),
    )


def _other(folder: Path, root: Path) -> Line:
    """Evidence without a ledger of its own, by the heading of its README, with the runs that lie in it counted as one:
    a cell that several of them have counts as the latest says."""
    text = (folder / "README.md").read_text(errors="replace")
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    href = quote((folder / "README.md").relative_to(root).as_posix())
    runs = sorted(
        (load(path) for path in folder.iterdir() if ledger.find(path).is_file()),
        key=lambda run: (run.started, run.name),
    )
    latest = {result.cell.id: result for run in runs for result in run.results}
    whole = Run(name=folder.name, results=tuple(latest.values()))
    return Line(
        name=folder.name,
        href=href,
        started=runs[0].started if runs else "",
        hardware=tuple(dict.fromkeys(name for run in runs for name in run.hardware)),
        headline=clean(title),
        counts=tuple(tally(whole)),
        exit_status=whole.exit_status if latest else None,
    )


def _href(run_dir: Path, root: Path) -> str:
    """The run's page as seen from the index; empty where it has none."""
    page = run_dir / "index.html"
    return quote(page.relative_to(root).as_posix()) if page.exists() else ""


def _grid(found: History, hrefs: list[str]) -> list[Changed]:
    """The cells whose verdict changed, or that are bad now; those that are bad first."""
    first = max(0, len(found.runs) - _COLUMNS)
    chosen = [track for track in found.tracks.values() if track.news]
    return [_changed(track, found, hrefs, first) for track in chosen] if len(found.runs) > 1 else []


def _changed(track: Track, found: History, hrefs: list[str], first: int) -> Changed:
    by_place = dict(track.verdicts)
    address = fragment(cell=track.id)

    def mark(place: int) -> Mark | None:
        if place not in by_place:
            return None
        href = f"{hrefs[place]}#{address}" if hrefs[place] else ""
        return Mark(verdict=by_place[place], href=href, run=found.runs[place].name)

    def named(place: int | None) -> str:
        return "" if place is None else found.runs[place].name

    return Changed(
        id=track.id,
        name=track.name,
        marks=tuple(mark(place) for place in range(first, len(found.runs))),
        first_bad=named(track.first_bad),
        last_good=named(track.last_good),
        gone=named(track.gone),
    )

"""The index over runs: `reports/index.html`, over committed evidence and local runs."""

from pathlib import Path

from harness import ledger
from harness.frozen import Frozen
from harness.report.page import headline, lede
from harness.report.run import Run, load
from harness.report.template import environment
from harness.report.text import legal
from harness.verdict import Verdict


class Line(Frozen):
    """One run in the index."""

    name: str
    href: str  # empty: the run has no page yet
    started: str
    hardware: tuple[str, ...]
    headline: str
    lede: str
    counts: tuple[tuple[Verdict, int], ...]
    exit_status: int | None
    left_out: int


def index(reports_dir: Path) -> Path:
    """Write `reports_dir/index.html`, newest first: `reports_dir/*/` is committed, `reports_dir/runs/*/` is local."""
    committed = _lines(reports_dir, reports_dir)
    local = _lines(reports_dir / "runs", reports_dir)
    sections = [("Committed evidence", committed), ("Runs on this machine", local)]
    text = legal(environment().get_template("index.html.j2").render(sections=sections))
    scratch = reports_dir / ".index.html.tmp"
    scratch.write_text(text, encoding="utf-8")
    return scratch.replace(reports_dir / "index.html")


def _lines(folder: Path, root: Path) -> list[Line]:
    found = [_line(path.parent, root) for path in folder.glob(f"*/{ledger.NAME}")]
    return sorted(found, key=lambda line: (line.started, line.name), reverse=True)


def _line(run_dir: Path, root: Path) -> Line:
    run: Run = load(run_dir)
    counts = {verdict: sum(result.verdict is verdict for result in run.results) for verdict in Verdict}
    has_page = (run_dir / "index.html").exists()
    return Line(
        name=run.name,
        href=(run_dir / "index.html").relative_to(root).as_posix() if has_page else "",
        started=run.started,
        hardware=run.hardware,
        headline=headline(run),
        lede=lede(run),
        counts=tuple((verdict, count) for verdict, count in counts.items() if count),
        exit_status=run.exit_status if run.results else None,
        left_out=len(run.left_out) + len(run.unfinished),
    )

"""Ledger in, report out: one page a run, an index over runs, and the same facts for machines.

report.write(run_dir)      the ledger -> index.html, results.json, .csv and .parquet, junit.xml, summary.md, badge.svg
report.frame(run_dir)      the run as a pandas DataFrame, one row a cell
report.history(reports)    all runs as one DataFrame, one row a cell and run
report.index(reports)      reports/index.html over the committed evidence and the local runs
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from harness.report import badge, junit, machine, markdown, page, store
from harness.report import history as runs
from harness.report.index import index
from harness.report.past import past_of
from harness.report.run import load
from harness.report.table import tabulate

__all__ = ["frame", "history", "index", "write"]


def write(run_dir: Path, reports: Path | None = None) -> Path:
    """Draw the report of one run beside its ledger and return the page's path.

    `reports` is the folder of runs to compare with; without it, the one that `run_dir` lies in as `DIR/runs/NAME`.
    Never fails on what the ledger holds: a record that cannot be used is named on the page instead.
    """
    with _uncollected():
        return _write(run_dir, reports)


def _write(run_dir: Path, reports: Path | None) -> Path:
    run = load(run_dir)
    table = tabulate(run)
    _put(run_dir / store.NAME, [store.parquet(run, table, store.digest_of(run_dir))])
    past = past_of(run_dir, reports)
    with page.drawn(run, table, run_dir, past) as parts:
        _put(run_dir / "results.json", machine.results_json(run, table))
        _put(run_dir / "results.csv", [machine.results_csv(table).encode()])
        _put(run_dir / "junit.xml", [junit.junit_xml(run).encode()])
        _put(run_dir / "summary.md", [markdown.summary(run, table, past.changes[0] if past.changes else None).encode()])
        _put(run_dir / "badge.svg", [badge.badge(run).encode()])
        _put(run_dir / "index.html", parts)
    return run_dir / "index.html"


def frame(run_dir: Path) -> pd.DataFrame:
    """The run as one table for a notebook: `report.frame(path).pivot_table(index="backend", columns="column", …)`.

    One row a cell; the columns are `harness.report.table.COLUMNS` and `stat:NAME` for each statistic of the oracle.
    """
    return tabulate(load(Path(run_dir)))


def history(reports: Path) -> pd.DataFrame:
    """All runs below `reports` as one table, a row a cell and run, the oldest run first (`place` 0).

    The columns of `frame`, with `place` and the run's `folder` in front.
    """
    return runs.frame(runs.find_runs(Path(reports)))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: a large run is millions of small values that it would walk again and again,
    for a fifth of the time, and no cycle among them is large."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.enable()


def _put(path: Path, content: Iterable[bytes]) -> None:
    """A reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as stream:
        stream.writelines(content)
    scratch.replace(path)

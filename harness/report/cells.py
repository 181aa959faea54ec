"""The HTML of every cell, its body packed in large runs. Where there are many, on all cores."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from harness.report.cellview import Row, body_of
from harness.report.run import Run
from harness.report.template import environment
from harness.report.text import legal, packed
from harness.result import CellResult

#: Fewer cells than this are not worth another process.
_PARALLEL_FROM = 1000
_CHUNK = 250
#: Where a packed body comes; nothing that was escaped can hold it.
_HERE = Markup("<body>")


class _Work:
    """What the workers inherit by fork; nothing large travels to them."""

    def __init__(self, rows: Sequence[Row], results: dict[str, CellResult], run: Run, run_dir: Path | None, pack: bool):
        self.rows, self.results, self.run, self.run_dir, self.pack = rows, results, run, run_dir, pack
        self.logs = _logs(run_dir)

    def render(self, start: int, stop: int) -> list[str]:
        # Macros: a template's own context for each cell takes longer than the cell.
        row_of = environment().get_template("row.html.j2").module.row
        cell_of = environment().get_template("cell.html.j2").module.body
        found = []
        for row in self.rows[start:stop]:
            cell = row.result.cell
            body = body_of(
                row,
                baseline=self.results.get(row.result.baseline_id),
                earlier=self.run.earlier.get(cell.id, ()),
                tries=self.run.tries.get(cell.id, ()),
                image=self.run.image,
                code=self.run.code,
                log=self.logs.get(cell.key[:8]),
                run_dir=self.run_dir,
                whole_log=self.pack,
            )
            html = cell_of(body)
            if self.pack:  # what is packed is legal, and long
                head, tail = legal(row_of(row, "", _HERE)).split(_HERE)
                found.append(f"{head}{packed(html)}{tail}")
            else:
                found.append(legal(row_of(row, html, "")))
        return found


_work: _Work | None = None


def render_cells(
    rows: Sequence[Row], results: dict[str, CellResult], run: Run, run_dir: Path | None, pack: bool
) -> list[str]:
    """The HTML of each row, in order. `pack`: bodies travel compressed and are opened by the page's script."""
    global _work
    work = _Work(rows, results, run, run_dir, pack)
    cores = min(len(os.sched_getaffinity(0)), 8)
    if len(rows) < _PARALLEL_FROM or cores == 1:
        return work.render(0, len(rows))
    _work = work
    try:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            parts = pool.map(_part, range(0, len(rows), _CHUNK), chunksize=1)
    finally:
        _work = None
    return [html for part in parts for html in part]


def _part(start: int) -> list[str]:
    return _work.render(start, start + _CHUNK)


def _logs(run_dir: Path | None) -> dict[str, Path]:
    """The start of a cell's key -> its `server.log`, for the logs that are on this disk."""
    if run_dir is None:
        return {}
    return {path.parent.name.rpartition("__")[2]: path for path in run_dir.glob("cells/*/server.log")}

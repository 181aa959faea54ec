"""The HTML of every cell, its body packed in large runs. Where there are many, on all cores."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
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
        # Macros: a template's own context for each cell takes longer than the cell.
        self.row_of = environment().get_template("row.html.j2").module.row
        self.cell_of = environment().get_template("cell.html.j2").module.body

    def render(self, start: int, stop: int) -> list[bytes]:
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
            html = self.cell_of(body)
            if self.pack:  # what is packed is legal, and long
                head, tail = legal(self.row_of(row, "", _HERE)).split(_HERE)
                found.append(f"{head}{packed(html)}{tail}".encode())
            else:
                found.append(legal(self.row_of(row, html, "")).encode())
        return found


_work: _Work | None = None


@contextmanager
def drawn(
    rows: Sequence[Row], results: dict[str, CellResult], run: Run, run_dir: Path | None, pack: bool
) -> Iterator[Iterable[bytes]]:
    """The HTML of each row, in order; many are drawn while the caller does something else.

    `pack`: bodies travel compressed and are opened by the page's script.
    """
    global _work
    work = _Work(rows, results, run, run_dir, pack)
    cores = min(len(os.sched_getaffinity(0)), 8)
    if len(rows) < _PARALLEL_FROM or cores == 1:
        yield work.render(0, len(rows))
        return
    _work = work
    try:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            yield chain.from_iterable(pool.imap(_part, range(0, len(rows), _CHUNK)))
    finally:
        _work = None


def _part(start: int) -> list[bytes]:
    return _work.render(start, start + _CHUNK)


def _logs(run_dir: Path | None) -> dict[str, Path]:
    """The start of a cell's key -> its `server.log`, for the logs that are on this disk."""
    if run_dir is None:
        return {}
    return {path.parent.name.rpartition("__")[2]: path for path in run_dir.glob("cells/*/server.log")}

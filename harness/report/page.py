"""The page: one HTML file that holds its style, its script and its drawings, and may load nothing."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from harness import ledger
from harness.oracle.alarms import Table as Alarms
from harness.oracle.caught import rows_of as defects_of
from harness.report.cells import drawn as cells_drawn
from harness.report.cellview import Row, row_of
from harness.report.past import NOTHING, Past
from harness.report.run import Run
from harness.report.square import COLUMNS, HARDWARE, Matrix, Square, matrices, place, severity
from harness.report.template import asset, environment, script_hash
from harness.report.text import legal, packed, plural
from harness.result import CellResult
from harness.verdict import Effect, Verdict

#: Above this many cells the bodies travel compressed and are opened by the script when a reader opens the cell.
PACK_ABOVE = 100
#: This many differing cells and movers stand above the matrix, which starts on the first screen; the others are one
#: click away.
_NEWS = 2


@dataclass(frozen=True)
class Group:
    """The cells behind one square, worst first; `square` is None for cells with a planted defect."""

    title: str
    anchor: str
    square: Square | None
    cells: list[Row]


@contextmanager
def drawn(
    run: Run, table: pd.DataFrame, run_dir: Path | None = None, past: Past = NOTHING
) -> Iterator[Iterable[bytes]]:
    """The page of `run`, part by part; its cells are drawn while the caller does something else.

    `table` is its `harness.report.table.tabulate`, `run_dir` where its logs may be.
    """
    results = {result.cell.id: result for result in run.results}
    found = matrices(table, results)
    by_model = matrices(table, results, by="model")
    live, idle = _by_use(found, results)
    ranked = sorted(run.results, key=lambda result: severity(result.declared, result.verdict))
    rows = _rows(run, results, dict(zip(table["id"], table["kind"], strict=True)), past)
    script = asset("page.js")
    shell = (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            headline=headline(run),
            lede=lede(run),
            works=works(found, results),
            tally=tally(run),
            # A limitation that is gone has a place of its own, above them.
            differing=[
                rows[one.cell.id] for one in ranked if one.effect is Effect.DIFFERS and one.verdict is not Verdict.XPASS
            ],
            broken=[rows[one.cell.id] for one in ranked if one.effect is Effect.INFRASTRUCTURE],
            gone_limits=[rows[one.cell.id] for one in ranked if one.verdict is Verdict.XPASS],
            changes=_changes(past),
            matrices=live,
            idle=idle,
            idle_hardware=list(dict.fromkeys(name for matrix in idle for name in matrix.hardware)),
            idle_cells=sum(len(square.cells) for matrix in idle for square in matrix.squares),
            by_model=[part for half in _by_use(by_model, results) for part in half]
            if any(len(matrix.models) > 1 for matrix in found)
            else [],
            defects=defects_of(run.results),
            alarms=_alarms(run_dir),
            columns=COLUMNS,
            groups=_groups(found, rows),
            facets=_facets(rows.values(), _FACETS),
            more=[facet for facet in _facets(rows.values(), _MORE) if len(facet[2]) > 1],
            cell_of=lambda row: Markup(f"<!--cell {row.number}-->"),
            packed=len(results) > PACK_ABOVE,
            news=_NEWS,
            source=ledger.find(run_dir).name if run_dir else ledger.NAME,
            versions=_versions(run),
            script=script,
            script_hash=script_hash(script),
        )
    )
    with cells_drawn(list(rows.values()), results, run, run_dir, pack=len(results) > PACK_ABOVE) as cells:
        yield _filled(legal(shell), cells)


def _alarms(run_dir: Path | None) -> Alarms | None:
    """What `python -m harness alarms --json RUN/alarms.json` counted, where somebody put it beside the run.

    A file that is no such table is left out, with a warning: the run's own cells are drawn all the same.
    """
    path = run_dir and run_dir / "alarms.json"
    if not path or not path.is_file():
        return None
    try:
        return Alarms.model_validate_json(path.read_text())
    except ValueError:
        print(f"warning: {path} is no table of `python -m harness alarms --json`; left out", file=sys.stderr)
        return None


def _filled(shell: str, cells: Iterable[bytes]) -> Iterator[bytes]:
    """The page with its cells in their places. Text of the ledger cannot hold such a place: it has been escaped."""
    found = list(cells)
    for index, part in enumerate(re.split(r"<!--cell (\d+)-->", shell)):
        yield found[int(part)] if index % 2 else part.encode()


def _rows(run: Run, results: dict[str, CellResult], kinds: dict[str, str], past: Past) -> dict[str, Row]:
    return {
        cell_id: row_of(
            number=number,
            result=one,
            kind=kinds[cell_id],
            severity=severity(one.declared, one.verdict),
            baseline=results.get(one.baseline_id),
            past=past.cells.get(cell_id),
        )
        for number, (cell_id, one) in enumerate(results.items())
    }


def _changes(past: Past) -> list[tuple[str, str, Markup, str]]:
    """(label, run, html, packed html) of each run to compare with; the first is shown, the others travel packed."""
    template = environment().get_template("changes.html.j2")
    found = []
    for one in past.changes:
        html = template.render(c=one, few=_NEWS, many=200)
        name, day = one.before.name, one.before.header.started[:10]
        label = name if not day or day.replace("-", "") in name.replace("-", "") else f"{name}, {day}"
        found.append((label, name, Markup("") if found else Markup(html), packed(html) if found else ""))
    return found


def _by_use(found: list[Matrix], results: dict[str, CellResult]) -> tuple[list[Matrix], list[Matrix]]:
    """The tables of the hardware on which something ran, and those of the rest, which are folded.

    Where nothing ran at all, nothing is folded.
    """
    squares = [square for matrix in found for square in matrix.squares]
    ran = {square.hardware for square in squares if square.verdict not in (Verdict.SKIP, Verdict.STALE)}
    rest = {square.hardware for square in squares} - ran
    if not ran:
        return found, []
    parts = [[part for matrix in found if (part := matrix.part(names))] for names in (ran, rest)]
    live, idle = ([_with_models(part, results) for part in half] for half in parts)
    return live, idle


def _with_models(matrix: Matrix, results: dict[str, CellResult]) -> Matrix:
    """The matrix with the models behind its own squares only."""
    behind = {results[cell_id].cell.model for square in matrix.squares for cell_id in square.cells}
    return matrix.model_copy(update={"models": tuple(sorted(behind))})


def headline(run: Run) -> str:
    """The run in one short sentence."""
    differing, broken = len(run.with_effect(Effect.DIFFERS)), len(run.with_effect(Effect.INFRASTRUCTURE))
    if differing:
        return f"{plural(differing, 'cell')} {'differs' if differing == 1 else 'differ'} from what is declared"
    if broken:
        return f"No verdict differs, but {plural(broken, 'cell')} could not be judged"
    if not run.with_effect(Effect.OK):
        return "Nothing ran on this machine"
    return "Everything that ran is as declared"


def lede(run: Run) -> str:
    """The counts behind the headline."""
    counts = Counter(result.effect for result in run.results)
    said = [
        f"{counts[Effect.OK]:,} as declared",
        f"{counts[Effect.DIFFERS]:,} differing" if counts[Effect.DIFFERS] else "",
        f"{plural(counts[Effect.INFRASTRUCTURE], 'infrastructure error')}" if counts[Effect.INFRASTRUCTURE] else "",
        f"{counts[Effect.NEUTRAL]:,} not run here" if counts[Effect.NEUTRAL] else "",
    ]
    unstarted = (Verdict.SKIP, Verdict.REJECTED, Verdict.ERROR)
    shared = sum(one.cell.shares_gpu and one.verdict not in unstarted for one in run.results)
    note = f" Of {shared:,} all ranks were on one GPU: for validation, not for speed." if shared else ""
    return f"{plural(len(run.results), 'cell')}: {', '.join(part for part in said if part)}.{note}"


def works(found: list[Matrix], results: dict[str, CellResult]) -> list[tuple[str, str, str, str, list[str]]]:
    """(kind, backend, hardware, anchor, models) of every square where Helix's answers pass and nothing differs."""
    return [
        (square.kind, square.backend, square.hardware, square.anchor, models)
        for matrix in found
        for square in matrix.squares
        if square.column == "Helix" and not square.disagrees and (models := _passing(square, results))
    ]


def _passing(square: Square, results: dict[str, CellResult]) -> list[str]:
    """Models that pass behind a square, by last name, each once; of a measured cell the answers were not judged."""
    behind = [results[cell_id] for cell_id in square.cells]
    passing = [one.cell.model for one in behind if one.verdict is Verdict.PASS and one.bench is None]
    return sorted({model.removeprefix("recipe:").rpartition("/")[2] for model in passing})


def tally(run: Run) -> list[tuple[Verdict, int]]:
    """How often each verdict was seen, in the order of the list's "worst first"."""
    ranked = sorted(run.results, key=lambda result: severity(result.declared, result.verdict))
    return list(Counter(result.verdict for result in ranked).items())


def _groups(found: list[Matrix], rows: dict[str, Row]) -> list[Group]:
    groups = []
    for matrix in found:
        for square in matrix.squares:
            title = f"{square.backend} · {square.column} · {square.hardware}"
            groups.append(Group(title, square.anchor, square, [rows[cell_id] for cell_id in square.cells]))
    planted = [one for one in rows.values() if one.result.cell.fault]
    if planted:
        groups.append(Group("Planted defects: what the oracle must find", "planted", None, planted))
    return groups


#: Filters in the bar, and those behind "More": field of a row -> label.
_FACETS = {"verdict": "Verdict", "kind": "Family", "column": "Mode", "hardware": "Hardware", "backend": "Backend",
           "model": "Model"}  # fmt: skip
_MORE = {"tp": "TP", "kvp": "KVP", "comm": "Combine", "interleave": "Interleave", "workload": "Workload",
         "suite": "Suite", "declared": "Declared"}  # fmt: skip


def _facets(rows: Iterable[Row], labels: dict[str, str]) -> list[tuple[str, str, list[str]]]:
    """(field, label, values) of each filter that can tell cells apart."""
    verdicts = tuple(str(verdict) for verdict in Verdict)
    order = {"verdict": verdicts, "declared": verdicts, "hardware": HARDWARE, "column": COLUMNS}
    values: dict[str, set[str]] = {field: set() for field in labels}
    for row in rows:
        for field, found in values.items():
            found.update(row.facets[field])
    found = []
    for field, label in labels.items():
        known = order.get(field, ())
        ranked = sorted(
            values[field], key=lambda value: (*place(value, known)[:1], len(value) * value.isdigit(), value)
        )
        found.append((field, label, ranked))
    return found


def _versions(run: Run) -> list[str]:
    """Each version that some cell ran with, `vllm 0.32.0`; more than one of a kind is worth seeing."""
    return list(dict.fromkeys(f"{name} {value}" for result in run.results for name, value in result.versions))[:8]

"""The page: one HTML file that holds its style, its script and its drawings, and may load nothing."""

import base64
import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.report import drawing
from harness.report.cellview import CellView, view
from harness.report.run import Run
from harness.report.square import COLUMNS, HARDWARE, Matrix, Square, matrices, place, severity
from harness.report.text import fragment, legal, packed, plural
from harness.verdict import TABLE, Effect, Verdict

#: Above this many cells the bodies travel compressed and are opened by the script when a reader opens the cell.
PACK_ABOVE = 100
#: This many differing cells stand above the matrix; the others are one click away.
_NEWS = 5
_HERE = Path(__file__).parent


@cache
def environment() -> Environment:
    """Jinja with autoescape on. What it renders goes through `text.legal` before it is written."""
    found = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"fragment": fragment, "plural": plural, "sprite": drawing.sprite(), "style": asset("style.css")}
    found.filters["breakable"] = lambda name: Markup("_<wbr>").join(name.split("_"))
    return found


def asset(name: str) -> Markup:
    """One of our own files, to stand in the page as it is."""
    return Markup((_HERE / name).read_text())


def script_hash(script: str) -> str:
    """The Content-Security-Policy source that lets this one script run, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@dataclass(frozen=True)
class Group:
    """The cells behind one square, worst first; `square` is None for cells with a planted defect."""

    title: str
    anchor: str
    square: Square | None
    cells: list[CellView]


def render(run: Run, table: pd.DataFrame) -> str:
    """The page of `run`; `table` is its `harness.report.table.tabulate`."""
    results = {result.cell.id: result for result in run.results}
    found = matrices(table, results)
    pack = len(results) > PACK_ABOVE
    views = {}
    for cell_id, kind in zip(table["id"], table["kind"], strict=True):
        one = results[cell_id]
        views[cell_id] = view(one, kind, results.get(one.baseline_id), run.earlier.get(cell_id, ()), whole_log=pack)
    body = environment().get_template("cell.html.j2")

    def body_of(cell: CellView) -> tuple[str, Markup]:
        """(packed, "") or ("", html)"""
        text = body.render(c=cell)
        return (packed(text), Markup("")) if pack else ("", Markup(text))

    groups = _groups(found, views)
    ranked = sorted(run.results, key=lambda result: severity(result.declared, result.verdict))
    script = asset("page.js")
    return legal(
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            headline=headline(run),
            lede=lede(run),
            works=works(found),
            tally=_tally(run),
            differing=[views[result.cell.id] for result in ranked if result.effect is Effect.DIFFERS],
            broken=[views[result.cell.id] for result in ranked if result.effect is Effect.INFRASTRUCTURE],
            matrices=found,
            columns=COLUMNS,
            groups=groups,
            facets=_facets(table),
            legend=TABLE,
            body_of=body_of,
            packed=pack,
            news=_NEWS,
            versions=_versions(run),
            script=script,
            script_hash=script_hash(script),
        )
    )


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
    return f"{plural(len(run.results), 'cell')}: {', '.join(part for part in said if part)}."


def works(found: list[Matrix]) -> list[tuple[str, str, str, str]]:
    """(kind, backend, hardware, anchor) of every square where Helix passes."""
    return [
        (square.kind, square.backend, square.hardware, square.anchor)
        for matrix in found
        for square in matrix.squares
        if square.column == "Helix" and square.verdict is Verdict.PASS
    ]


def _tally(run: Run) -> list[tuple[Verdict, int]]:
    counts = Counter(result.verdict for result in run.results)
    return [(verdict, counts[verdict]) for verdict in Verdict if counts[verdict]]


def _groups(found: list[Matrix], views: dict[str, CellView]) -> list[Group]:
    groups = []
    for matrix in found:
        for square in matrix.squares:
            title = f"{square.backend} · {square.column} · {square.hardware}"
            groups.append(Group(title, square.anchor, square, [views[cell_id] for cell_id in square.cells]))
    planted = [one for one in views.values() if one.result.cell.fault]
    if planted:
        groups.append(Group("Planted defects: what the oracle must find", "planted", None, planted))
    return groups


def _facets(table: pd.DataFrame) -> list[tuple[str, str, list[str]]]:
    """(field, label, values) of each filter."""
    verdicts = [str(verdict) for verdict in Verdict]
    order = {"verdict": tuple(verdicts), "hardware": HARDWARE, "column": COLUMNS}
    labels = {"verdict": "Verdict", "kind": "Family", "column": "Mode", "hardware": "Hardware", "backend": "Backend",
              "model": "Model"}  # fmt: skip
    return [
        (field, label, sorted(set(table[field]), key=lambda value: place(value, order.get(field, ()))))
        for field, label in labels.items()
    ]


def _versions(run: Run) -> list[str]:
    """Each version that some cell ran with, `vllm 0.32.0`; more than one of a kind is worth seeing."""
    return list(dict.fromkeys(f"{name} {value}" for result in run.results for name, value in result.versions))[:8]

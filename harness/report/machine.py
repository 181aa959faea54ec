"""The run for other programs: `results.json` with a published schema, and a CSV."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic_core import to_json

from harness.frozen import Frozen
from harness.models.sheet import ModelCard
from harness.report.run import Run
from harness.report.square import Square, matrices
from harness.report.text import clean
from harness.result import CellResult
from harness.verdict import Effect

SCHEMA = 1
SCHEMA_FILE = Path(__file__).parent.parent / "schemas" / f"results-v{SCHEMA}.json"


class Entry(Frozen):
    """One cell: its names, its part in the exit status, and the whole record of the ledger."""

    id: str
    key: str
    kind: Literal["GQA", "MLA"]
    effect: Effect
    result: CellResult


class Results(Frozen):
    """`results.json`. Numbers that JSON cannot hold (NaN, infinities) are null."""

    schema_version: Literal[1] = SCHEMA
    run: str
    started: str
    ended: str
    hardware: tuple[str, ...]
    argv: tuple[str, ...]
    exit_status: int
    counts: dict[str, int]
    matrix: tuple[Square, ...]
    cells: tuple[Entry, ...]
    models: tuple[ModelCard, ...] = ()
    unfinished: tuple[str, ...]
    left_out: tuple[str, ...]


def results_json(run: Run, table: pd.DataFrame) -> Iterator[bytes]:
    """Part by part, a cell at a time: a large run has a hundred megabytes of them."""
    by_id = {result.cell.id: result for result in run.results}
    kinds = dict(zip(table["id"], table["kind"], strict=True))
    value = Results(
        run=run.name,
        started=run.started,
        ended=run.ended,
        hardware=run.hardware,
        argv=run.argv,
        exit_status=run.exit_status,
        counts={str(verdict): int(count) for verdict, count in table["verdict"].value_counts().items()},
        matrix=tuple(square for matrix in matrices(table, by_id) for square in matrix.squares),
        cells=(),
        models=run.models,
        unfinished=run.unfinished,
        left_out=run.left_out,
    )
    mark = b'"cells":[]'  # no square of the matrix is empty, and in a string the quotes would be escaped
    head, tail = to_json(value, inf_nan_mode="null").split(mark)
    yield head + mark[:-1]
    for place, (cell_id, result) in enumerate(by_id.items()):
        entry = Entry(id=cell_id, key=result.cell.key, kind=kinds[cell_id], effect=result.effect, result=result)
        yield b"," * (place > 0) + to_json(entry, inf_nan_mode="null")
    yield mark[-1:] + tail + b"\n"


def results_csv(table: pd.DataFrame) -> str:
    texts = table.select_dtypes(exclude="number").columns
    told = {
        name: [clean(value) if isinstance(value, str) else value for value in table[name].tolist()] for name in texts
    }
    return table.assign(**told).rename(columns=clean).to_csv(index=False, lineterminator="\n")


def schema() -> str:
    """The JSON Schema of `results.json`; `python -m harness.report.machine` writes it to its file."""
    found = Results.model_json_schema(mode="serialization")
    numbers = {
        "Statistic": ("value", "bound", "low", "high", "null"),
        "CurvePoint": ("kl", "worst", "null", "band"),
        "Phase": ("seconds",),
        "Interval": ("value", "low", "high"),
    }
    for definition, fields in numbers.items():
        for field in fields:  # a NaN or an infinity is written as null
            found["$defs"][definition]["properties"][field]["type"] = ["number", "null"]
            found["$defs"][definition]["properties"][field].pop("anyOf", None)
    pair = found["$defs"]["Difference"]["properties"]
    for side in ("baseline", "candidate"):
        pair[side]["items"]["prefixItems"][1]["type"] = ["number", "null"]
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema())

"""A plan as a table for people and as a document for programs (`plan-v1.json` is its schema)."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helix_runtime.planner import words
from helix_runtime.planner.plan import Plan
from helix_runtime.planner.row import Row
from helix_runtime.planner.verdict import Gains

SCHEMA_FILE = Path(__file__).parent / "plan-v1.json"
_COLUMNS = (
    ("TP", "right"),
    ("DCP", "right"),
    ("TPA", "right"),
    ("mode", "left"),
    ("backend", "left"),
    ("servers", "right"),
    ("KV a user\nGB/GPU", "right"),
    ("copies", "right"),
    ("users\nfit", "right"),
    ("weights\nGB/GPU", "right"),
    ("ms a token\n(band)", "right"),
    ("atten-\ntion", "right"),
    ("weights\nQKV, O", "right"),
    ("weights\nFFN", "right"),
    ("gather", "right"),
    ("ex-\nchange", "right"),
    ("all-\nreduce", "right"),
    ("launch", "right"),
    ("prefill", "right"),
    ("tok/s\na GPU", "right"),
    ("bound by", "left"),
)


class FitOut(BaseModel):
    """One class of the calibration, of attention one backend. `band`: a factor; `n` 0 means assumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    efficiency: float
    overhead_us: float
    band: float
    n: int
    source: str


class Document(BaseModel):
    """`plan --format json`. Times as in `Row`; the first row is the best at what was asked.

    `serving`: what the command of `best` leaves to the reader. `starts_today`: the best that is not refused so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    hardware: str
    hardware_sources: tuple[str, ...]
    gpus: int
    context: int
    users: int | None
    ttl_ms: float | None
    weights: str
    kv: str
    block: int
    helix_pays: bool | None
    reason: str
    verdict: str
    about: str | None
    cliffs: str
    gains: Gains
    crossover: int | None
    best: Row | None
    serving: tuple[str, ...]
    starts_today: Row | None
    layouts: tuple[Row, ...]
    calibration: dict[str, FitOut]
    measurements_left_out: tuple[str, ...]


def document(plan: Plan, about: str | None = None) -> Document:
    question, calibration = plan.question, plan.calibration
    return Document(
        model=question.shape.name,
        hardware=question.gpu.key,
        hardware_sources=question.gpu.sources,
        gpus=question.gpus,
        context=question.context,
        users=question.users if question.ttl_ms is None else None,
        ttl_ms=question.ttl_ms,
        weights=question.weights,
        kv=question.kv,
        block=question.block,
        helix_pays=plan.verdict.pays,
        reason=plan.verdict.reason,
        verdict=words.verdict(plan),
        about=about,
        cliffs=words.cliffs(plan),
        gains=plan.verdict.gains,
        crossover=plan.verdict.crossover,
        best=plan.best,
        serving=words.serving(plan),
        starts_today=plan.starts_today,
        layouts=plan.rows,
        calibration={
            kind: FitOut(
                efficiency=min(fit.efficiency, 1e9),
                overhead_us=fit.overhead * 1e6,
                band=2.718281828459045**fit.band,
                n=fit.n,
                source=fit.source,
            )
            for kind, fit in plan.fits.items()
        },
        measurements_left_out=calibration.left_out,
    )


def schema() -> str:
    """The JSON Schema of `plan --format json`; `python -m helix_runtime.planner.show` writes it to its file."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}
    return json.dumps(found, indent=2) + "\n"


def show(plan: Plan, console: Console, about: str | None = None) -> None:
    """Table, verdict, cliffs, command. Backends that cost the same share a line."""
    question = plan.question
    asked = f"{question.users} users" if question.ttl_ms is None else f"at most {question.ttl_ms:g} ms a token"
    title = f"{question.shape.name} on {question.gpus} x {question.gpu.name}: {question.context:,} tokens, {asked}"
    table = Table(
        title=title,
        caption=f"{question.weights} weights, {question.kv} KV, blocks of {question.block}. Times in ms of one step. "
        "* on the Pareto front of speed and throughput; ¹ does not start today; grey: does not fit, or is too slow.",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        box=None,
    )
    for header, justify in _COLUMNS:
        table.add_column(header, justify=justify, no_wrap=header not in ("backend", "bound by"))
    for rows in _lines(plan):
        table.add_row(*_cells(rows), style="" if rows[0].possible else "bright_black")
    console.print(table)
    console.print()
    for paragraph in (words.verdict(plan), about, words.cliffs(plan)):
        if paragraph:
            console.print(Text(paragraph), end="\n\n")
    if plan.best:
        console.print(Text("Serve it with:"), style="bold")
        console.print(Text(f"  {plan.best.command}"), soft_wrap=True)
        for note in words.serving(plan):
            console.print(Text(f"  … {note}"), soft_wrap=True)
        console.print()
        if plan.best.refused_today and (starts := plan.starts_today):
            console.print(Text("That does not start today. This does:"), style="bold")
            console.print(Text(f"  {starts.command}"), soft_wrap=True)
            if starts.servers > 1:
                console.print(Text(f"  … on each of {starts.servers} groups of {starts.tp} GPUs"))
            console.print()
    console.print(Text(words.basis(plan)), style="bright_black")


def _lines(plan: Plan) -> list[list[Row]]:
    """Rows that differ in nothing but the backend, and cost the same, together."""
    lines: dict[tuple, list[Row]] = {}
    for row in plan.rows:
        lines.setdefault((row.tp, row.kvp, row.mode, round(row.latency_ms, 6)), []).append(row)
    return list(lines.values())


def _cells(rows: list[Row]) -> list[str]:
    row = rows[0]
    terms = [f"{value:.2f}" if value else "·" for value in row.terms_ms.values()]
    return [
        str(row.tp),
        str(row.kvp),
        str(row.tpa),
        row.mode + ("*" if row.pareto else ""),
        " ".join(one.backend + ("" if not one.refused_today else "¹") for one in rows),
        str(row.servers),
        f"{row.kv_bytes_per_user_gpu / 1e9:.3g}",
        str(row.duplication),
        str(row.users_that_fit),
        f"{row.weight_bytes_gpu / 1e9:.1f}",
        f"{row.latency_ms:.2f} ({row.latency_low_ms:.1f}-{row.latency_high_ms:.1f})",
        *terms,
        f"{row.prefill_factor:.2f}x" if row.prefill_factor else "·",
        f"{row.tokens_per_second_gpu:.1f}" if row.possible else "·",
        row.bound_by,
    ]


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema())

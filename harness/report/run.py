"""One run as its ledger tells it: the last result of every cell, and, said aloud, everything that was left out."""

import math
from pathlib import Path

from pydantic import Field, ValidationError

from harness import ledger
from harness.frozen import Frozen
from harness.models.sheet import ModelCard
from harness.report.text import clean
from harness.result import CellResult
from harness.verdict import Effect, exit_status

#: Fields of a record that hold a number where JSON has null, because it has no NaN.
_NUMBERS = ("value", "seconds", "kl", "worst", "band")


class Try(Frozen):
    """One attempt at a cell, as the ledger notes it; `cause` is why a server failed, empty where it did not."""

    number: int
    verdict: str
    reason: str
    cause: str = ""
    time: str = ""


class Run(Frozen):
    """What a report is drawn from. `left_out` holds one sentence for each record that could not be used."""

    name: str
    started: str = ""  # ISO 8601, UTC, as written
    ended: str = ""  # empty: the run is going on, or was cut off
    hardware: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    image: str = ""  # digest of the image that servers ran in; empty: processes of the host, or an older ledger
    code: str = ""  # hash of the code that ran
    results: tuple[CellResult, ...] = ()
    #: cell id -> results that a later one in this ledger replaced
    earlier: dict[str, tuple[CellResult, ...]] = Field(default_factory=dict)
    tries: dict[str, tuple[Try, ...]] = Field(default_factory=dict)  # cell id -> its attempts
    models: tuple[ModelCard, ...] = ()  # cards of the models that were made on the spot
    unfinished: tuple[str, ...] = ()  # ids that were planned or started and have no result
    left_out: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        return exit_status([(result.declared, result.verdict) for result in self.results])

    def with_effect(self, effect: Effect) -> tuple[CellResult, ...]:
        return tuple(result for result in self.results if result.effect is effect)


def load(run_dir: Path) -> Run:
    """Read the ledger in `run_dir`. Never raises on its content; a missing ledger is a run without results."""
    path = ledger.find(run_dir)
    events, left_out = read_events(path)
    start: dict = {}
    ended = ""
    started_cells: list[str] = []
    by_id: dict[str, list[CellResult]] = {}
    tries: dict[str, list[Try]] = {}
    models: tuple[ModelCard, ...] = ()
    for number, event in enumerate(events, start=1):
        match event.get("event"):
            case "run-start":
                start = {**event, "time": start.get("time") or event.get("time")}  # resumed: it began with the first
                started_cells += _strings(event.get("planned"))
            case "cell-start":
                started_cells += _strings(event.get("id") or event.get("cell"))
            case "attempt":
                tries.setdefault(_text(event.get("id")), []).append(_try(event))
            case "models":
                try:
                    models = tuple(ModelCard.model_validate(card) for card in event.get("models"))
                except (TypeError, ValidationError):
                    left_out.append(f"event {number}: its model cards do not fit this version")
            case "run-end":
                ended = str(event.get("time") or "at an unknown time")
            case "result":
                try:
                    result = parse_result(event.get("result"))
                    by_id.setdefault(result.cell.id, []).append(result)
                except ValueError as problem:
                    left_out.append(f"event {number}: {_named(event)}{problem}")
            case kind:
                left_out.append(f"event {number}: unknown event {str(kind)[:80]!r}")
    return Run(
        name=run_dir.name if path.suffix == ".xz" else _text(start.get("run")) or run_dir.name,  # evidence: its folder
        started=_text(start.get("time")),
        ended=_text(ended),
        hardware=tuple(_strings(start.get("hardware"))),
        argv=tuple(_strings(start.get("argv"))),
        **{name: _text(_setting(start).get(name)) for name in ("image", "code")},
        results=tuple(results[-1] for results in by_id.values()),
        earlier={cell_id: tuple(results[:-1]) for cell_id, results in by_id.items() if len(results) > 1},
        tries={cell_id: tuple(found) for cell_id, found in tries.items()},
        models=models,
        unfinished=tuple(dict.fromkeys(cell_id for cell_id in started_cells if cell_id not in by_id)),
        left_out=tuple(clean(sentence) for sentence in left_out),
    )


def read_events(path: Path) -> tuple[list[dict], list[str]]:
    """Events of a ledger, and one sentence for each line that is no event; a ledger that cannot be read has none."""
    try:
        return ledger.read(path)
    except OSError as problem:
        return [], [f"{path.name} could not be read: {problem.strerror or problem}"]
    except RecursionError:
        return [], [f"{path.name} could not be read: a line is nested too deeply"]


def parse_result(record: object) -> CellResult:
    """A result from its JSON value. `null` numbers of the oracle read as NaN.

    Raises ValueError with the first field that does not fit.
    """
    try:
        result = CellResult.model_validate(record)
    except (ValueError, RecursionError):
        result = _second_try(record)
    if result.kv_cache_tokens is not None and not 0 <= result.kv_cache_tokens < 2**63:
        raise ValueError("result does not fit this version: kv_cache_tokens: out of range")
    cell = result.cell
    for name, count in (
        ("tp", cell.tp),
        ("kvp", cell.kvp),
        ("interleave", cell.interleave),
        ("attempts", result.attempts),
    ):
        if abs(count) >= 2**31:
            raise ValueError(f"result does not fit this version: {name}: out of range")
    return result


def _second_try(record: object) -> CellResult:
    try:
        return CellResult.model_validate(_mended(record))
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise ValueError(f"result does not fit this version: {field}: {first['msg']}") from problem
    except RecursionError as problem:
        raise ValueError("result is nested too deeply") from problem


def _mended(value: object, field: str = "") -> object:
    if isinstance(value, dict):
        return {key: _mended(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return math.nan if value is None and field in _NUMBERS else value


def _setting(start: dict) -> dict:
    found = start.get("setting")
    return found if isinstance(found, dict) else {}


def _try(event: dict) -> Try:
    number = event.get("number")
    return Try(
        number=number if isinstance(number, int) else 0,
        **{name: _text(event.get(name)) for name in ("verdict", "reason", "cause", "time")},
    )


def _named(event: dict) -> str:
    """The cell's name, where an unreadable record still tells it."""
    result = event.get("result")
    cell = result.get("cell") if isinstance(result, dict) else None
    if not isinstance(cell, dict):
        return ""
    parts = [str(cell[name])[:60] for name in ("hardware", "mode", "backend", "model") if name in cell]
    return f"{'/'.join(parts)}: " if parts else ""


def _strings(value: object) -> list[str]:
    if value is None:
        return []
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, dict) and isinstance(value.get("id") or value.get("name"), str):
        value = value.get("id") or value.get("name")
    return "" if value is None else clean(str(value))

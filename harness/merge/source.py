"""One run that is merged: what its ledger says, read once and changed in nothing."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from harness import ledger
from harness.chosen import Chosen
from harness.frozen import Frozen
from harness.report.run import parse_result
from harness.report.store import digest_of
from harness.result import CellResult
from harness.verdict import Effect


class Record(Frozen):
    """A result as written (`event`) and as it reads. `asked`: content hash of all that the verdict depends on."""

    event: dict
    result: CellResult
    asked: str

    @property
    def judged(self) -> bool:
        return self.result.effect in (Effect.OK, Effect.DIFFERS)


class Source(Frozen):
    """`name`: its folder's, with the path where several are called so; `run`: what it calls itself. `planned`: ids in
    order; `expected`: those of all shards. `chosen` is empty in old ledgers. `codes`: of the code that gave results;
    several where the run was merged or resumed, and "" for what is not recorded."""

    folder: Path
    name: str
    run: str
    started: str
    hardware: tuple[str, ...]
    planned: tuple[str, ...]
    chosen: Chosen | None
    codes: tuple[str, ...]
    records: dict[str, tuple[Record, ...]]  # by cell id, in order
    attempts: tuple[dict, ...]
    models: tuple[dict, ...]
    unread: tuple[str, ...] = ()  # a sentence for each line that could not be used

    @property
    def expected(self) -> tuple[str, ...]:
        return (self.chosen.expected if self.chosen else ()) or self.planned

    @property
    def last(self) -> Iterable[Record]:
        return (records[-1] for records in self.records.values())


class NothingToMerge(ValueError):
    """A folder holds no run; the text says which."""


def find_sources(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """The runs in `paths`, each a run or a folder of runs, the oldest first; one that is given twice counts once.

    With a sentence for each below a folder of runs that holds nothing, as a host lost at the start leaves it; one that
    was named itself is refused.
    """
    found: dict[str, Source] = {}
    empty: list[str] = []
    for path in paths:
        here = [path] if ledger.find(path).is_file() else _below(path)
        if not here:
            raise NothingToMerge(f"{path} holds no run: no {ledger.NAME} there or below")
        for folder in here:
            if (digest := digest_of(folder)) in found:
                continue
            try:
                found[digest] = load(folder)
            except NothingToMerge as problem:
                if folder == path:
                    raise
                empty.append(str(problem))
    if not found:
        raise NothingToMerge(few(empty))
    called = Counter(source.name for source in found.values())
    sources = [
        source.model_copy(update={"name": str(source.folder)}) if called[source.name] > 1 else source
        for source in found.values()
    ]
    return sorted(sources, key=lambda source: (source.started, source.name)), empty


def _below(path: Path) -> list[Path]:
    found = {file.parent for name in (ledger.NAME, ledger.PACKED) for file in path.rglob(name)}
    return sorted(found)


def load(folder: Path) -> Source:
    """The run in `folder`. NothingToMerge where its ledger cannot be read, or tells of no run."""
    try:
        events, unread = ledger.read(ledger.find(folder))
    except OSError as problem:
        raise NothingToMerge(f"{ledger.find(folder)} cannot be read: {problem.strerror or problem}") from None
    except RecursionError:
        raise NothingToMerge(f"{ledger.find(folder)} cannot be read: a line is nested too deeply") from None
    starts = [event for event in events if event["event"] == "run-start"]
    planned: dict[str, None] = {}
    for start in starts:
        planned |= dict.fromkeys(map(str, _list(start, "planned")))
    records: dict[str, list[Record]] = {}
    codes, running = {}, [""]
    for number, event in enumerate(events, start=1):
        if event["event"] == "run-start":
            running = _codes(event)
        if event["event"] != "result":
            continue
        try:
            result = parse_result(event.get("result"))
        except ValueError as problem:
            unread.append(f"event {number}: {problem}")
            continue
        record = Record(event=event, result=result, asked=str(event.get("key") or ""))
        records.setdefault(result.cell.id, []).append(record)
        codes |= dict.fromkeys(running)
    if not starts and not records:
        why = f"; not readable: {few(unread)}" if unread else ""
        raise NothingToMerge(
            f"nothing to merge in {folder}: its ledger has neither a run-start nor a result{why}. "
            "Leave it out, or name the folder of a run"
        )
    first = starts[0] if starts else {}
    models = next((_list(event, "models") for event in reversed(events) if event["event"] == "models"), [])
    return Source(
        folder=folder,
        name=folder.resolve().name,
        run=str(first.get("run") or ""),
        started=str(first.get("time") or ""),
        hardware=tuple(map(str, _list(first, "hardware"))),
        planned=tuple(planned or records),
        chosen=_chosen(first),
        codes=tuple(codes),
        records={cell_id: tuple(found) for cell_id, found in records.items()},
        attempts=tuple(event for event in events if event["event"] == "attempt"),
        models=tuple(model for model in models if isinstance(model, dict)),
        unread=tuple(unread),
    )


def _chosen(start: dict) -> Chosen | None:
    try:
        return Chosen.model_validate(start["chosen"]) if start.get("chosen") else None
    except ValidationError:
        return None


def _codes(start: dict) -> list[str]:
    """Of the run that begins so; of a merged one, those of its runs. "" is one that is not recorded."""
    if "codes" in start:
        return [str(code) for codes in _list(start, "codes") if isinstance(codes, list) for code in codes]
    setting = start.get("setting")
    return [str(setting.get("code") or "") if isinstance(setting, dict) else ""]


def _list(event: dict, field: str) -> list:
    found = event.get(field)
    return found if isinstance(found, list) else []


def few(names: Sequence[str], most: int = 3) -> str:
    """`names`, of many the first."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

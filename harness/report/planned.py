"""Which cells a later run would have planned, and did not: they were renamed, or left the suites."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from harness import ledger
from harness.cell import SHARE_GPU
from harness.chosen import Chosen
from harness.report.history import History, Track
from harness.report.run import read_events
from harness.suite import available, load_all


def last_without(history: History, tracks: Sequence[Track]) -> dict[str, int]:
    """Of `tracks` those that are planned no longer, by id: the latest run that planned cells on that hardware, was
    asked for such a cell, and did not plan it. A run of other suites, other `--cell` or without `--share-gpu` shows
    nothing of it, nor does one whose ledger does not say what it was asked for."""
    found, asked = {}, {}
    planned = [
        {track.id for track in history.tracks.values() if place in dict(track.verdicts)} | {*run.header.unfinished}
        for place, run in enumerate(history.runs)
    ] if tracks else []  # fmt: skip
    for track in tracks:
        for place in reversed(range(track.verdicts[-1][0] + 1, len(history.runs))):
            if track.id in planned[place]:
                break
            on = {cell_id.partition("/")[0] for cell_id in planned[place]}
            if place not in asked:
                asked[place] = _asked(history.runs[place].folder)
            if _hardware(track) in on and any(_means(chosen, track) for chosen in asked[place]):
                found[track.id] = place
                break
    return found


def _asked(folder: Path) -> tuple[Chosen, ...]:
    """What the run, or each of the runs merged in it, was asked for; empty where one does not say."""
    events, _ = read_events(ledger.find(folder))
    return tuple(_chosen(events))


def _chosen(events: Sequence[dict]) -> Iterator[Chosen]:
    starts = [event for event in events if event["event"] == "run-start"]
    for start in starts[-1:]:
        asked = start.get("asked")
        for chosen in asked if isinstance(asked, list) else [start.get("chosen")]:
            try:
                if chosen:
                    yield Chosen.model_validate(chosen)
            except ValidationError:
                continue


def _means(chosen: Chosen, track: Track) -> bool:
    """Whether this selection takes in such a cell, where a suite has it. Shards are of whole suites: their cells are
    listed by id."""
    usual, every = _suites()
    suites = {name for name in track.suites if name in every}  # the others are gone
    shared = f"{SHARE_GPU}=True" in track.id.split("/")
    return (
        suites <= set(chosen.suites or usual)
        and (bool(chosen.shard) or not chosen.cells or any(fnmatchcase(track.id, glob) for glob in chosen.cells))
        and (shared == chosen.share_gpu or _hardware(track) == "cpu")
    )


def _hardware(track: Track) -> str:
    return track.id.partition("/")[0]


@cache
def _suites() -> tuple[frozenset[str], frozenset[str]]:
    """Names of the suites of `--all`, and of all."""
    every = load_all(available())
    return frozenset(suite.name for suite in every if not suite.nightly), frozenset(suite.name for suite in every)

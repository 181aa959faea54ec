"""Saved transcripts of runs: found, named and paired."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harness.transcript import Transcript


class Saved(NamedTuple):
    """A transcript and what its cell id says of it (`hardware/mode/backend/model/tpN…/…`)."""

    path: Path
    transcript: Transcript

    @property
    def key(self) -> str:
        """Tells transcripts apart, also those of one cell."""
        return str(self.path)

    @property
    def mode(self) -> str:
        return self.transcript.cell_id.split("/")[1]

    @property
    def model(self) -> str:
        return self.transcript.cell_id.split("/")[3]

    @property
    def tp(self) -> int:
        return int(self.transcript.cell_id.split("/")[4].partition("-")[0].removeprefix("tp"))

    @property
    def forced(self) -> bool:
        """Its tokens were imposed."""
        return any(answer.forced for answer in self.transcript.answers)

    @property
    def fault(self) -> bool:
        return "fault=" in self.transcript.cell_id


def find(folders: Iterable[Path]) -> list[Saved]:
    """Every transcript below `folders` that has all its answers; of equal ones the first."""
    found: dict[str, Saved] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.json")):
            if path.name != "transcript.json" and not path.name.startswith("set-"):
                continue
            transcript = Transcript.load(path)
            if all(answer.steps for answer in transcript.answers):
                found.setdefault(transcript.digest(), Saved(path, transcript))
    return list(found.values())


def pairs(saved: Iterable[Saved]) -> Iterator[tuple[Saved, Saved]]:
    """(baseline, candidate) of every two that can be compared: same model, dtype and prompts, the first standard TP.

    A candidate that was made to follow is paired with those that hold the same tokens: the one that it followed, and
    what else was made to follow that.
    """
    saved = list(saved)
    for first in saved:
        if first.mode != "standard-tp" or first.fault:
            continue
        for second in saved:
            a, b = first.transcript, second.transcript
            same = (a.workload_key, a.dtype, first.model) == (b.workload_key, b.dtype, second.model)
            if first is second or not same:
                continue
            if not second.forced or _same_tokens(b, a):
                yield first, second


def _same_tokens(candidate: Transcript, baseline: Transcript) -> bool:
    tokens = {answer.prompt: [step.token_id for step in answer.steps] for answer in baseline.answers}
    return all(tokens.get(answer.prompt) == [step.token_id for step in answer.steps] for answer in candidate.answers)

"""Saved transcripts of runs: found, named and paired."""

from collections.abc import Iterable, Iterator
from itertools import permutations
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
    def standard(self) -> bool:
        return self.mode == "standard-tp"

    @property
    def forced(self) -> bool:
        """Its tokens were imposed."""
        return any(answer.forced for answer in self.transcript.answers)

    @property
    def complete(self) -> bool:
        """Every prompt has an answer. Another cannot stand for what is right; as a candidate it is an alarm."""
        return all(answer.steps for answer in self.transcript.answers)

    @property
    def fault(self) -> bool:
        return "fault=" in self.transcript.cell_id


def find(folders: Iterable[Path]) -> list[Saved]:
    """Every transcript below `folders`; of equal ones the first."""
    found: dict[str, Saved] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.json")):
            if path.name != "transcript.json" and not path.name.startswith("set-"):
                continue
            transcript = Transcript.load(path)
            found.setdefault(transcript.digest(), Saved(path, transcript))
    return list(found.values())


def pairs(saved: Iterable[Saved]) -> Iterator[tuple[Saved, Saved]]:
    """(first, second) of every two that can be compared: same model, dtype, prompts and, where imposed, tokens.

    First is standard TP where one of them is; two of standard TP come both ways, two of other modes once. First has
    all its answers, as a reference must.
    """
    saved = [item for item in saved if not item.fault]
    for first, second in permutations(saved, 2):
        a, b = first.transcript, second.transcript
        if (a.workload_key, a.dtype, first.model) != (b.workload_key, b.dtype, second.model):
            continue
        if not first.complete or (not first.standard and (second.standard or second.key < first.key)):
            continue
        if not (first.forced or second.forced) or _same_tokens(a, b):
            yield first, second


def _same_tokens(baseline: Transcript, candidate: Transcript) -> bool:
    """Whether all that was answered is to the same tokens; an answer that is missing or stops short names no other."""
    tokens = {answer.prompt: [step.token_id for step in answer.steps] for answer in baseline.answers}
    return all(
        [step.token_id for step in answer.steps] == tokens.get(answer.prompt, [])[: len(answer.steps)]
        for answer in candidate.answers
    )

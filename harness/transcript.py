"""What a server answered: tokens and raw top-k logprobs of every step, prompt by prompt. Saved as JSON."""

from pathlib import Path
from typing import Literal

from harness.frozen import Frozen, content_hash

SCHEMA = 1


class Prompt(Frozen):
    """One request. `kind` groups prompts for statistics (`boundary`, `long`, `batch`, `repeat`, …); `why` says which
    defect it would show; `batch` is the group of prompts that are sent at the same time (0 = alone). `abort_after`: the
    client hangs up after so many tokens, and the server must drop the request."""

    name: str
    kind: str
    why: str
    token_ids: tuple[int, ...]
    max_tokens: int
    batch: int = 0
    abort_after: int | None = None


class Step(Frozen):
    """One generated token: the token (forced or greedy) and the model's own raw top-k, token id -> natural logprob."""

    token_id: int
    logprob: float
    top: dict[int, float]


class Answer(Frozen):
    """The answer to one prompt. Step 0 is prefill's and is judged apart. `forced`: the tokens were imposed.
    `waived`: tokens that were asked for and not waited for, because the client hung up after these steps."""

    prompt: str
    kind: str
    prompt_length: int
    batch: int
    forced: bool
    steps: tuple[Step, ...]
    waived: int = 0


class Counts(Frozen):
    """What the server itself counted while it was asked (`/metrics`): tokens generated and, of prompts, served from the
    prefix cache; preemptions."""

    generated: int
    cached: int
    preempted: int


class Transcript(Frozen):
    """All answers of one server. `cell_key` and `workload_key` say what it may be compared with. `counts` is None for a
    server that counts nothing."""

    schema_version: Literal[1] = SCHEMA
    cell_id: str
    cell_key: str
    workload_key: str
    dtype: str
    vocab_size: int
    top_k: int
    answers: tuple[Answer, ...]
    counts: Counts | None = None

    def digest(self) -> str:
        return content_hash(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json())

    @classmethod
    def load(cls, path: Path) -> "Transcript":
        return cls.model_validate_json(path.read_text())

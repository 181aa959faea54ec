"""What a server answered: tokens and raw top-k logprobs of every step, prompt by prompt. Saved as JSON.

The format is published (`harness/schemas/transcript-v1.json`, written by `python -m harness.transcript`), so that the
answers of any engine can be judged: `python -m harness judge`.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from harness.frozen import Frozen, content_hash

SCHEMA = 1
SCHEMA_FILE = Path(__file__).parent / "schemas" / f"transcript-v{SCHEMA}.json"

#: Natural logarithm of a probability. JSON has no NaN and no infinities: null stands for them and is read as NaN.
Logprob = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"type": ["number", "null"], "description": "natural logprob; null: the engine gave no number"}),
]


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
    """One generated token: the token (forced or greedy) and the model's own raw top-k, token id -> natural logprob.

    Raw: of the whole vocabulary, before temperature, penalties or any mask. `top` holds the `top_k` likeliest tokens,
    whether or not the token itself is among them; `logprob` is the token's own.
    """

    token_id: int = Field(ge=0)
    logprob: Logprob
    top: dict[int, Logprob]


class Answer(Frozen):
    """The answer to one prompt. Step 0 is prefill's and is judged apart.

    `prompt`: its name, the same in both transcripts. `kind`: its class, for statistics. `prompt_length`: tokens.
    `batch`: the number of the group of prompts that were sent at the same time, 0: alone. `forced`: the tokens were
    imposed (those of the baseline); where they were chosen freely, two answers are compared up to where they part.
    `waived`: tokens that were asked for and not waited for, because the client hung up after these steps. `asked`:
    tokens that were asked for, 0 where nobody says; a baseline with fewer steps is no reference.
    """

    prompt: str
    kind: str
    prompt_length: int = Field(ge=0)
    batch: int = Field(ge=0)
    forced: bool
    steps: tuple[Step, ...]
    waived: int = 0
    asked: int = 0


class Counts(Frozen):
    """What the server itself counted while it was asked (`/metrics`): tokens generated and, of prompts, served from the
    prefix cache; preemptions."""

    generated: int
    cached: int
    preempted: int


class Transcript(Frozen):
    """All answers of one server.

    `workload_key` must be the same in both transcripts: any text that names the prompts. `cell_id` says in words what
    answered, and `cell_key` is a hash of it; another engine may write what it likes. `dtype` is what it computed in
    (`float32`, `bfloat16`, `float16`). `counts` is None for a server that counts nothing.
    """

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
        """Raises OSError, or ValueError (pydantic's) when the file is no transcript."""
        return cls.model_validate_json(path.read_text())


def schema() -> str:
    """The JSON Schema of a transcript file."""
    found = Transcript.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema())

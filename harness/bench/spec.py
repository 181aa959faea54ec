"""What a suite asks of a bench cell: loads, rounds, and the latency at which a request counts as good."""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from harness.frozen import Frozen

Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0, strict=False)]


def _plain_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Strict(Frozen):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Load(Strict):
    """Random prompts of `input` tokens, answers of `output` tokens, at most `concurrency` at a time."""

    input: Count
    output: Annotated[int, Field(ge=2, description="two at least, or there is no time between tokens")]
    concurrency: Count
    requests: Annotated[int | None, Field(ge=1, description="of one round; four times the concurrency unless told")] = (
        None
    )

    @property
    def per_round(self) -> int:
        return self.requests or 4 * self.concurrency

    @property
    def label(self) -> str:
        return f"{self.input}+{self.output}x{self.concurrency}"


class Goodput(Strict):
    """A request is good when it keeps all that are given: first token, mean time of the others, the whole answer."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    e2el_ms: Milliseconds | None = None

    def to_args(self) -> list[str]:
        """vLLM's `--goodput` with its values; empty where nothing is asked."""
        given = [f"{name.removesuffix('_ms')}:{value:g}" for name, value in self if value is not None]
        return ["--goodput", *given] if given else []


class BenchSpec(Strict):
    """`rounds`: how often cell and baseline each take every load; the interval is over rounds."""

    loads: Annotated[tuple[Load, ...], BeforeValidator(_plain_list), Field(min_length=1)]
    rounds: Annotated[int, Field(ge=2, le=50)] = 5
    goodput: Goodput = Goodput()

    @property
    def workload(self) -> str:
        """What stands in a cell's `workload`, so that other loads make another cell."""
        return "bench-" + ",".join(load.label for load in self.loads) + f"-r{self.rounds}"

"""The record of one cell: declared and observed verdict, the reason in a sentence, the evidence. Ledger -> report."""

from harness.bench.result import BenchResult
from harness.cell import Cell
from harness.frozen import Frozen, light
from harness.verdict import Effect, Verdict, effect_of


@light
class Statistic:
    """One number of the oracle with its bound: `value` beyond `bound` means a difference; None bounds nothing.

    `low` and `high`: its 95 % interval, where it has one. `null`: the same number of standard TP against
    itself; of a largest value its 99.9 % point, which one clean cell in a thousand exceeds.
    """

    name: str
    value: float
    bound: float | None
    n: int
    unit: str
    note: str = ""
    low: float | None = None
    high: float | None = None
    null: float | None = None


@light
class CurvePoint:
    """KL of decode against the baseline on positions `low` to `high`, in nats, over `n` steps: mean and `worst` step.

    `null`: the null's mean there, None where it has no such positions; `band`: what no step may exceed.
    """

    low: int
    high: int
    n: int
    kl: float
    worst: float
    null: float | None
    band: float


class Difference(Frozen):
    """One step at which cell and baseline disagree most: for the reader, side by side.

    `texts`: what the tokens of both lists say, by the model's tokenizer; empty where the judge had none, and in older
    ledgers.
    """

    prompt: str
    step: int
    position: int  # of the predicted token in the whole sequence
    baseline: tuple[tuple[int, float], ...]  # top-k, (token id, logprob), best first
    candidate: tuple[tuple[int, float], ...]
    texts: tuple[tuple[int, str], ...] = ()  # (token id, text)


@light
class Phase:
    """Wall-clock seconds of one phase of an attempt (model, start, workload, judge, stop); shown, never asserted."""

    name: str
    seconds: float


class CellResult(Frozen):
    """One finished cell. `suites` are all the suites that asked for it; `proof` is what the workers wrote."""

    cell: Cell
    suites: tuple[str, ...]
    declared: Verdict
    declared_why: str
    verdict: Verdict
    reason: str
    baseline_id: str | None = None
    statistics: tuple[Statistic, ...] = ()
    differences: tuple[Difference, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    band: str = ""  # one sentence on the null band and the false-alarm rate it was judged at
    proof: tuple[dict, ...] = ()  # helix_runtime.proof.RankProof, one a rank
    versions: tuple[tuple[str, str], ...] = ()
    hardware_name: str = ""
    command: str = ""
    log_tail: str = ""
    kv_cache_tokens: int | None = None
    phases: tuple[Phase, ...] = ()
    transcript_digest: str | None = None
    localisation: str = ""  # of a failed cell: the first layer, head and rank that went wrong
    attempts: int = 1
    started: str = ""  # ISO 8601, UTC
    bench: BenchResult | None = None  # of a measured cell: load by load, against its baseline

    @property
    def effect(self) -> Effect:
        return effect_of(self.declared, self.verdict)

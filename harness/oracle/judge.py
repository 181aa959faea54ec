"""Differences and a null band -> one judgement at a stated false-alarm rate, with every number behind it."""

import math
from collections.abc import Sequence

from harness.frozen import Frozen
from harness.oracle.band import RUN_RATE, Band
from harness.oracle.compare import Comparison, StepChange, bin_ends, compare
from harness.oracle.measure import NO_NUMBER, Rates, beyond, measure
from harness.result import CurvePoint, Difference, Statistic
from harness.transcript import Transcript

LEAST_TOP = 20  # logprobs of a step, unless the vocabulary is smaller: with fewer, most of a change stays unseen
SHOWN = 5  # differences kept for the reader
SHOWN_TOP = 5  # tokens of each


class Judgement(Frozen):
    """Whether the answers agree, why (one sentence), the numbers, and the steps that differ most, worst first.

    `forced`: the candidate was made to follow the baseline to the end; without that, agreement is agreement up to
    where they part, which proves less. `beyond`: names of the statistics beyond their bounds. `curve`: KL of decode by
    position. `band`: one sentence on the band and the rate.
    """

    agree: bool
    reason: str
    forced: bool = True
    beyond: tuple[str, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    differences: tuple[Difference, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    band: str = ""


def judge(
    baseline: Transcript, candidate: Transcript, band: Band, *, cells: int = 1, rate: float = RUN_RATE
) -> Judgement:
    """Compare the candidate with the baseline that it followed, as one of `cells` cells of a run.

    `rate`: how often such a run, were all its cells right, may raise any alarm. ValueError when the two were not asked
    the same, computed in another dtype than the band's, or hold too few logprobs of each step.
    """
    if baseline.workload_key != candidate.workload_key:
        raise ValueError(f"{candidate.cell_id} answered another workload than {baseline.cell_id}")
    for transcript in (baseline, candidate):
        if transcript.dtype != band.dtype:
            raise ValueError(f"the band is for {band.dtype}, {transcript.cell_id} computed in {transcript.dtype}")
    _check_lists(baseline, candidate)
    found = compare(baseline, candidate)
    rates = Rates(rate / max(1, cells))
    statistics = measure(found, band, rates)
    alarms = beyond(statistics)
    curve = _curve(found, band, rates)
    told = (
        f"null band {band.name}: {sum(source.steps for source in band.sources if source.used):,} steps; "
        f"false-alarm rate {rate:g} a run of {cells} cell{'s' if cells != 1 else ''}"
        + "".join(
            f"; left out, {source.kind} {source.candidate}: {source.why}" for source in band.sources if source.why
        )
    )
    common = {
        "forced": found.forced, "statistics": statistics, "curve": curve, "band": told,
        "beyond": tuple(item.name for item in alarms),
    }  # fmt: skip
    if not alarms:
        return Judgement(agree=bool(found.steps), reason=_agreement(found, statistics), **common)
    return Judgement(
        agree=False,
        reason=_disagreement(found, alarms),
        differences=tuple(_difference(step, baseline, candidate) for step in _shown(found.steps)),
        **common,
    )


def _check_lists(baseline: Transcript, candidate: Transcript) -> None:
    """ValueError unless both hold the same number of logprobs of each step, and enough of them, and the baseline every
    step that it was asked for."""
    if baseline.top_k != candidate.top_k:
        raise ValueError(f"{candidate.cell_id} holds the top {candidate.top_k} of each step, not {baseline.top_k}")
    small = baseline.vocab_size < LEAST_TOP
    if baseline.top_k < LEAST_TOP and not small:
        raise ValueError(f"the top {baseline.top_k} of each step is too little; ask for at least {LEAST_TOP} logprobs")
    for answer in baseline.answers:
        if len(answer.steps) + answer.waived < answer.asked:
            took = f"{len(answer.steps)} of {answer.asked} tokens of prompt {answer.prompt}"
            raise ValueError(f"{baseline.cell_id} is no reference: it gave {took}")
        for index, step in enumerate(answer.steps):
            if len(step.top) < baseline.top_k and not small:
                said = f"step {index} of prompt {answer.prompt} lists {len(step.top)} tokens of {baseline.top_k}"
                raise ValueError(f"{baseline.cell_id}: {said}")


def _agreement(found: Comparison, statistics: tuple[Statistic, ...]) -> str:
    if not found.steps:
        return "nothing was compared"
    largest = max((item for item in statistics if item.name.endswith("largest logprob change")), key=lambda i: i.value)
    said = f"{len(found.steps)} steps agree; largest logprob change {largest.value:.2g} nat, bound {largest.bound:.2g}"
    if found.parted:
        said += f"; tokens were not imposed: {len(found.parted)} prompts were compared up to where they part"
    return said


def _disagreement(found: Comparison, alarms: list[Statistic]) -> str:
    """A missing answer says more than the numbers that it made infinite; then the first statistic in order."""
    first = alarms[0]
    if first.value < NO_NUMBER:
        reason = f"{first.name} is {first.value:.3g} {first.unit}, bound {first.bound:.3g}"
    else:
        reason = f"{first.name} is no number (NaN or infinite), bound {first.bound:.3g} {first.unit}"
    if first.note:
        reason += f" ({first.note})"
    of_phase = [step for step in found.steps if step.prefill == first.name.startswith("prefill")]
    if of_phase and not first.note:
        worst = max(of_phase, key=lambda step: step.widest)
        reason += f"; most at step {worst.step} of prompt {worst.prompt}"
    return reason


def _curve(found: Comparison, band: Band, rates: Rates) -> tuple[CurvePoint, ...]:
    decode = [step for step in found.steps if not step.prefill]
    if not decode:
        return ()
    null = {point.bin: point for point in band.decode.curve}
    bound = band.decode.distance.bound(rates.largest, len(decode), band.spread.cell) ** 2 / 2
    points = []
    for bin_ in sorted({step.bin for step in decode}):
        kls = [min(step.kl, NO_NUMBER) for step in decode if step.bin == bin_]
        low, end = bin_ends(bin_)
        points.append(
            CurvePoint(
                low=low, high=end - 1, n=len(kls), kl=math.fsum(kls) / len(kls), worst=max(kls),
                null=null[bin_].kl if bin_ in null else None, band=bound,
            )
        )  # fmt: skip
    return tuple(points)


def _shown(steps: Sequence[StepChange]) -> list[StepChange]:
    """The steps that differ most, the worst first; among them the earliest at which another token is the best one."""
    worst = sorted(steps, key=lambda step: -step.widest)[:SHOWN]
    first = min((step for step in steps if not step.same_best), key=lambda step: step.step, default=None)
    return worst if first is None or first in worst else [*worst[: SHOWN - 1], first]


def _difference(step: StepChange, baseline: Transcript, candidate: Transcript) -> Difference:
    return Difference(
        prompt=step.prompt,
        step=step.step,
        position=step.position,
        baseline=_top(baseline, step),
        candidate=_top(candidate, step),
    )


def _top(transcript: Transcript, step: StepChange) -> tuple[tuple[int, float], ...]:
    answer = next(answer for answer in transcript.answers if answer.prompt == step.prompt)
    top = answer.steps[step.step].top.items()
    numbers = [(token, value if math.isfinite(value) else -NO_NUMBER) for token, value in top]
    return tuple(sorted(numbers, key=lambda item: -item[1])[:SHOWN_TOP])

"""Differences -> one judgement. First version: fixed bounds; statistics are plain values, so another may replace it."""

import math
from collections.abc import Sequence

import numpy as np

from harness.frozen import Frozen
from harness.oracle.band import Band
from harness.oracle.compare import Comparison, StepChange, compare
from harness.result import Difference, Statistic
from harness.transcript import Transcript

SHOWN = 5  # differences kept for the reader
SHOWN_TOP = 5  # tokens of each
#: Stands for "no number" in statistics, which travel as JSON; vLLM's API writes -inf as -9999.
NO_NUMBER = 9999.0


class Judgement(Frozen):
    """Whether the answers agree, why (one sentence), the numbers, and the steps that differ most, worst first."""

    agree: bool
    reason: str
    statistics: tuple[Statistic, ...] = ()
    differences: tuple[Difference, ...] = ()


def judge(baseline: Transcript, candidate: Transcript, band: Band) -> Judgement:
    """Compare the candidate with the baseline that it followed. ValueError when the two were not asked the same."""
    if baseline.workload_key != candidate.workload_key:
        raise ValueError(f"{candidate.cell_id} answered another workload than {baseline.cell_id}")
    found = compare(baseline, candidate)
    statistics = measure(found, band)
    beyond = [item for item in statistics if item.bound is not None and not item.value <= item.bound]
    shown = tuple(
        _difference(step, baseline, candidate) for step in sorted(found.steps, key=lambda s: -s.widest)[:SHOWN]
    )
    if not beyond:
        count = len(found.steps)
        largest = max((step.widest for step in found.steps), default=0.0)
        reason = f"{count} steps agree; largest logprob change {largest:.2g} nat, bound {band.max_change:g}"
        return Judgement(agree=bool(count), reason=reason if count else "nothing was compared", statistics=statistics)
    # A missing answer says more than the numbers that it made infinite; then the first statistic in order.
    first = beyond[0]
    reason = f"{first.name} is {first.value:.3g} {first.unit}, bound {first.bound:g}"
    if first.note:
        reason += f" ({first.note})"
    of_phase = [step for step in found.steps if (step.step == 0) == first.name.startswith("prefill")]
    if of_phase and not first.note:
        worst = max(of_phase, key=lambda step: step.widest)
        reason += f"; most at step {worst.step} of prompt {worst.prompt}"
    return Judgement(agree=False, reason=reason, statistics=statistics, differences=shown)


def measure(found: Comparison, band: Band) -> tuple[Statistic, ...]:
    """All statistics: missing answers, then those of prefill's token (step 0), then those of decode."""
    note = "; ".join(f"{item.prompt}: {item.reason}" for item in found.missing[:3])
    missing = Statistic(
        name="missing answers", value=len(found.missing), bound=0, n=len(found.missing), unit="prompts", note=note
    )
    prefill = [step for step in found.steps if step.step == 0]
    decode = [step for step in found.steps if step.step > 0]
    return (missing, *_of_phase("prefill", prefill, band), *_of_phase("decode", decode, band))


def _of_phase(phase: str, steps: Sequence[StepChange], band: Band) -> list[Statistic]:
    if not steps:
        return []
    count = len(steps)
    change = np.array([step.change for step in steps])
    lost = [step for step in steps if not step.same_best and not step.margin <= band.margin]
    said = "; ".join(f"{step.prompt} step {step.step}, margin {step.margin:.2g}" for step in lost[:3])
    agreement = float(np.mean([step.same_best for step in steps]))
    # method="higher" takes a measured value: interpolating next to an infinite one would give NaN.
    p99 = float(np.percentile(change, 99, method="higher"))

    def of(name: str, value: float, bound: float | None, unit: str, note: str = "") -> Statistic:
        value = min(value, NO_NUMBER)
        return Statistic(name=f"{phase}: {name}", value=value, bound=bound, n=count, unit=unit, note=note)

    return [
        of("largest logprob change", max(step.widest for step in steps), band.max_change, "nat"),
        of("99th percentile change of the imposed token", p99, band.p99_change, "nat"),
        of("largest KL of the top tokens", max(step.kl for step in steps), band.max_kl, "nat"),
        of("best token lost despite its margin", len(lost), 0, "steps", said),
        of("same best token", agreement, None, "share"),
    ]


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

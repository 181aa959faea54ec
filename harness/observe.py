"""From what a run showed to the verdict of a cell. Pure: an attempt, the plan, the baseline; no processes."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from harness.cell import Cell
from harness.executors.local import Attempt
from harness.matrix import PlannedCell
from harness.oracle.band import Band
from harness.oracle.compare import compare
from harness.oracle.judge import Judgement, judge
from harness.oracle.proof import check_proof
from harness.result import Statistic
from harness.server.log import Cause
from harness.transcript import Transcript
from harness.verdict import Verdict

#: How the refusal of a worker begins whose start-up self-test failed (`helix_runtime/vllm_plugin/self_test.py`).
SELF_TEST = "self-test of the"


class Observation(NamedTuple):
    verdict: Verdict
    reason: str
    judgement: Judgement | None = None


def observe(
    item: PlannedCell, attempt: Attempt, baseline: Transcript | None, band: Band | None = None, cells: int = 1
) -> Observation:
    """The verdict of one cell, one of `cells` that the run judges.

    `baseline` is None for references and declared refusals only; `band` is None where none could be measured.
    """
    if item.declared is Verdict.REJECTED:
        return _refusal(item, attempt)
    if attempt.failure is not None:
        return _failed(attempt)
    transcript = attempt.transcript
    if transcript is None:
        return Observation(Verdict.ERROR, "the server was not asked")
    if item.cell.baseline and item.baseline is None:
        return _reference(transcript)
    if baseline is None:
        return Observation(Verdict.ERROR, "there is no baseline to compare with")
    if band is None:
        return _without_band(item, transcript)
    try:
        judgement = judge(baseline, transcript, band, cells=cells)
    except ValueError as problem:
        return Observation(Verdict.ERROR, f"cannot compare: {problem.args[0]}")
    judgement = with_counts(judgement, transcript)
    if item.cell.baseline:
        return _baseline(transcript, judgement)
    return _compared(item, attempt, judgement)


def _refusal(item: PlannedCell, attempt: Attempt) -> Observation:
    """A declared refusal: it must come before the server is ready, and with the documented rule."""
    failure = attempt.failure
    if failure is None:
        return Observation(Verdict.FAIL, "the server started, although a refusal is declared")
    if item.refusal and not attempt.started and item.refusal in f"{failure.reason}\n{failure.log_tail}":
        return Observation(Verdict.REJECTED, failure.reason)
    if failure.cause is not Cause.REFUSED:
        return Observation(Verdict.ERROR, f"{failure.cause}: {failure.reason}")
    if item.refusal:
        reason = f"refused, but without the documented text {item.refusal!r}: {failure.reason}"
        return Observation(Verdict.FAIL, reason)
    return Observation(Verdict.REJECTED, failure.reason)


def _failed(attempt: Attempt) -> Observation:
    failure = attempt.failure
    if failure.cause is Cause.REFUSED and SELF_TEST in failure.reason:
        # No rule of the documentation: the exchange merged known partials wrongly, and the server said so.
        return Observation(Verdict.FAIL, failure.reason)
    if failure.cause is Cause.REFUSED:
        return Observation(Verdict.REJECTED, failure.reason)
    when = "while answering" if attempt.started else "at start"
    return Observation(Verdict.ERROR, f"the server failed {when}: {failure.cause}: {failure.reason}")


def _baseline(transcript: Transcript, judgement: Judgement) -> Observation:
    """A baseline on several ranks must itself agree with one rank; a difference is a defect of stock vLLM, or noise."""
    seen = _reference(transcript)
    if seen.verdict is not Verdict.PASS:
        return seen
    if not judgement.agree:
        return Observation(Verdict.FAIL, f"standard TP itself differs from TP1: {judgement.reason}", judgement)
    return Observation(Verdict.PASS, f"{seen.reason}; against TP1, {judgement.reason}", judgement)


def _without_band(item: PlannedCell, transcript: Transcript) -> Observation:
    """A baseline can still be a reference; a cell cannot be judged."""
    if not item.cell.baseline:
        return Observation(Verdict.ERROR, f"cannot compare: no null band for {transcript.dtype} of {item.cell.model}")
    seen = _reference(transcript)
    if seen.verdict is not Verdict.PASS:
        return seen
    return seen._replace(reason=f"{seen.reason}; not compared with TP1: no null band for {transcript.dtype}")


def _reference(transcript: Transcript) -> Observation:
    """A cell that others are compared with: it passes when it answered all, to the last token that was asked for."""
    silent = [answer.prompt for answer in transcript.answers if not answer.steps]
    if silent:
        return Observation(Verdict.ERROR, f"no answer to {len(silent)} prompts, the first is {silent[0]}")
    short = [answer for answer in transcript.answers if len(answer.steps) + answer.waived < answer.asked]
    if short:
        took = f"the first is {short[0].prompt}: {len(short[0].steps)} of {short[0].asked}"
        return Observation(Verdict.ERROR, f"{len(short)} prompts got fewer tokens than were asked for; {took}")
    numberless = sum(not math.isfinite(step.logprob) for answer in transcript.answers for step in answer.steps)
    if numberless:
        return Observation(Verdict.ERROR, f"{numberless} steps of a reference hold no number (NaN or infinity)")
    steps = sum(len(answer.steps) for answer in transcript.answers)
    return Observation(Verdict.PASS, f"the reference: {len(transcript.answers)} prompts, {steps} steps")


def with_counts(judgement: Judgement, transcript: Transcript) -> Judgement:
    """`judgement` with what the server counted of itself: the evidence for prefix hits, preemption and aborts."""
    if transcript.counts is None:
        return judgement
    aborted = [answer for answer in transcript.answers if answer.waived]
    took = sum(len(answer.steps) for answer in transcript.answers)
    said = f"clients took {took} tokens, the server generated {transcript.counts.generated}"
    counted = (
        ("requests cancelled midway", len(aborted), "requests", said if aborted else ""),
        ("prompt tokens from the prefix cache", transcript.counts.cached, "tokens", ""),
        ("preemptions", transcript.counts.preempted, "requests", ""),
    )
    found = tuple(
        Statistic(name=f"server: {name}", value=value, bound=None, n=len(transcript.answers), unit=unit, note=note)
        for name, value, unit, note in counted
    )
    return judgement.model_copy(update={"statistics": (*judgement.statistics, *found)})


def dropped(transcript: Transcript) -> str | None:
    """None where the server dropped what clients hung up on, by its own count; else what is wrong with the claim.

    Until it notices, the server goes on for some steps; of what was not asked for any more, it must save half.
    """
    aborted = [answer for answer in transcript.answers if answer.waived]
    if not aborted:
        return None
    got = sum(len(answer.steps) for answer in transcript.answers)
    if transcript.counts is None:
        return f"{len(aborted)} requests were cancelled, but the server does not count what it generated"
    if transcript.counts.generated - got > sum(answer.waived for answer in aborted) / 2:
        return (
            f"{len(aborted)} requests were cancelled, but the server generated {transcript.counts.generated} tokens "
            f"where clients took {got}: it did not drop them"
        )
    return None


def longest_written(transcript: Transcript) -> int:
    """Tokens of the longest sequence whose keys and values were written: those of its last token never are."""
    return max(
        (answer.prompt_length + len(answer.steps) - 1 for answer in transcript.answers if answer.steps), default=0
    )


def uncached(cell: Cell, attempt: Attempt) -> str | None:
    """What is wrong with the claim that a repeated prompt reads what ranks hold of it already; None if nothing is.

    Told on CPU, where the workers count it, and unless the cell switches prefix caching off.
    """
    repeated = any(answer.kind == "repeat" for answer in attempt.transcript.answers)
    if cell.hardware != "cpu" or not repeated or "no-enable-prefix-caching" in dict(cell.serve):
        return None
    for proof in attempt.proofs:
        if not proof.counters.get("context_prefill"):
            return f"rank {proof.rank}: a prompt was asked twice, and no prefill read what was cached"
    return None


def never_empty(cell: Cell, attempt: Attempt) -> str | None:
    """What is wrong with the claim that shards without a token were merged; None if nothing is.

    A prompt of one token leaves every shard but the first one's empty. Told on CPU, where the workers count them.
    """
    short = any(answer.prompt_length == 1 for answer in attempt.transcript.answers)
    if cell.hardware != "cpu" or cell.kvp == 1 or not short:
        return None
    if any(proof.counters.get("empty_shard") for proof in attempt.proofs):
        return None
    return "a prompt of one token was asked, and no rank counted an empty shard"


def unpreempted(cell: Cell, transcript: Transcript) -> str | None:
    """What is wrong with the claim that a cache which was made small is too small for a batch; None if nothing is."""
    if "num-gpu-blocks-override" not in dict(cell.serve):
        return None
    if transcript.counts is None:
        return "its cache was made small, but the server does not count whom it preempted"
    return None if transcript.counts.preempted else "its cache was made small, and no request was preempted"


def _compared(item: PlannedCell, attempt: Attempt, judgement: Judgement) -> Observation:
    if not judgement.agree:
        verdict = Verdict.XFAIL if item.declared is Verdict.XFAIL else Verdict.FAIL
        return Observation(verdict, judgement.reason, judgement)
    if not judgement.forced:
        return Observation(Verdict.UNPROVEN, judgement.reason, judgement)
    unproven = (
        check_proof(item.cell, attempt.proofs, longest_written(attempt.transcript))
        or dropped(attempt.transcript)
        or uncached(item.cell, attempt)
        or never_empty(item.cell, attempt)
        or unpreempted(item.cell, attempt.transcript)
    )
    if unproven:
        return Observation(Verdict.UNPROVEN, f"{judgement.reason}; but {unproven}", judgement)
    if item.cell.fault:
        said = "NOT CAUGHT" if item.declared is Verdict.FAIL else "not caught, as declared"
        return Observation(Verdict.PASS, f"the defect {item.cell.fault} was {said}: {judgement.reason}", judgement)
    verdict = Verdict.XPASS if item.declared is Verdict.XFAIL else Verdict.PASS
    return Observation(verdict, judgement.reason, judgement)


#: A step that changed by more than so many times what nine in ten did is no tail of the same noise: of an exponential
#: one, the largest of 500 is 2.7 times that.
STANDS_OUT = 8.0


def stands_out(first: Transcript, second: Transcript) -> bool:
    """Whether the largest change between two answers is of another kind than the rest."""
    changes = [step.widest for step in compare(first, second).steps]
    return max(changes, default=0.0) > STANDS_OUT * float(np.quantile(changes, 0.9)) if changes else False


def asked_twice(
    seen: Observation, first: Transcript, second: Transcript, band: Band | None, cells: int = 1
) -> Observation:
    """`seen`, what a baseline showed, unless its answers in other batches differ from its first in single steps.

    A server that errs now and then is no reference: each cell that follows its wrong step would be called wrong. `band`
    must come from elsewhere: the run's own is made of these very two, and judges how loud it is in all. It may be of
    quieter models, so a step must also stand out among this model's own.
    """
    if band is None:
        return seen._replace(reason=f"{seen.reason}; its second answers were not compared: no band from elsewhere")
    try:
        judgement = judge(first, second, band, cells=cells)
    except ValueError as problem:
        return Observation(Verdict.ERROR, f"cannot compare its two answers: {problem.args[0]}")
    if not any("largest" in name for name in judgement.beyond) or not stands_out(first, second):
        return seen
    said = f"standard TP, asked again in other batches, differs from itself: {judgement.reason}"
    return Observation(Verdict.FAIL, said, judgement)


def between_starts(
    seen: Observation, first: Transcript, second: Transcript, band: Band | None, cells: int = 1
) -> Observation:
    """`seen`, what a cell's further start showed, with how far its answers are from those of its first start.

    Two starts of one server may differ as two right servers do, no more: beyond that the cell is `flaky`.
    """
    if band is None:
        return seen
    try:
        judgement = judge(first, second, band, cells=cells)
    except ValueError as problem:
        return Observation(Verdict.ERROR, f"cannot compare two starts: {problem.args[0]}")
    if not judgement.agree:
        return Observation(Verdict.FLAKY, f"two starts of it differ: {judgement.reason}", judgement)
    if seen.judgement is None:
        return seen._replace(reason=f"{seen.reason}; another start of it: {judgement.reason}")
    largest = tuple(
        replace(item, name=f"between two starts, {item.name}")
        for item in judgement.statistics
        if item.name.endswith("largest logprob change")
    )
    statistics = (*seen.judgement.statistics, *largest)
    return seen._replace(judgement=seen.judgement.model_copy(update={"statistics": statistics}))


def with_capacity(seen: Observation, found: Statistic | None) -> Observation:
    """`seen` with the measured KV capacity among its statistics; a cell that agrees but misses its promise fails."""
    if found is None or seen.judgement is None:
        return seen
    judgement = seen.judgement.model_copy(update={"statistics": (*seen.judgement.statistics, found)})
    if seen.verdict is Verdict.PASS and found.value > found.bound:
        return Observation(Verdict.FAIL, f"answers agree, but the KV cache holds {found.note}", judgement)
    return seen._replace(judgement=judgement)

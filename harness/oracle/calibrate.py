"""Pairs of standard-TP transcripts -> the null band."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from harness.oracle.band import EXPONENTIAL, Band, Curve, PhaseBand, Row, Shapes, Source, Spread
from harness.oracle.compare import StepChange, compare
from harness.oracle.statistics import fit_tail
from harness.transcript import Transcript

#: A change below this is none: an fp32 logprob around -10 has a resolution of 1e-6.
RESOLUTION = 1e-7
#: For levels, a change below this share of the null's median counts as this share: a step that hardly changed, by
#: luck, must not outweigh others that are twice as loud.
QUIET = 0.25
LEAST_STEPS = 100  # decode steps of a null that can stand for itself
MOSTLY = 0.5
#: Standard TP that differs from itself by more than this on average says nothing about anything, in nats.
MOST_KL = 0.1
#: A pair this much louder than the quietest one that is used is no rounding: one of its servers is wrong.
MOST_LOUDER = 10.0
#: Nor is a null whose median step changed by more than so many roundings of its dtype. A choice: the shipped
#: bands lie at 20 to 154. It is for runs with one pair only, which has no quieter one beside it.
MOST_ROUNDINGS = 4096
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class NullPair(NamedTuple):
    """Two transcripts of standard TP on the same prompts. `kind`: `tp size`, `batch composition` or `again`."""

    kind: str
    baseline: Transcript
    candidate: Transcript


def calibrate(
    pairs: Sequence[NullPair], *, name: str, model: str, spread: Spread, shapes: Shapes = EXPONENTIAL
) -> Band:
    """The band of `pairs`. ValueError, with the reason, where they are too few, identical, or do not agree at all.

    `spread` and `shapes` cannot be measured from the few pairs of a run; they come with the shipped band.
    """
    compared = [
        (pair, [step for step in compare(pair.baseline, pair.candidate).steps if math.isfinite(step.widest)])
        for pair in pairs
    ]
    sources = _chosen([_source(pair, found) for pair, found in compared])
    steps = [step for source, (_, found) in zip(sources, compared, strict=True) if source.used for step in found]
    decode = [step for step in steps if not step.prefill]
    if len(decode) < LEAST_STEPS:
        said = ", ".join(f"{source.kind} {source.identical:.0%} identical" for source in sources) or "no pairs"
        raise ValueError(f"only {len(decode)} null steps in which anything was reordered ({said})")
    kl = float(np.mean([step.kl for step in decode]))
    if kl > MOST_KL:
        raise ValueError(f"standard TP differs from itself by {kl:.2g} nat on average: nothing can be compared with it")
    dtype, middle = pairs[0].baseline.dtype, float(np.median([step.widest for step in decode]))
    if middle > MOST_ROUNDINGS * ROUNDING.get(dtype, math.inf):
        raise ValueError(
            f"standard TP differs from itself by {middle:.2g} nat in the median step, {middle / ROUNDING[dtype]:,.0f} "
            f"roundings of {dtype} where {MOST_ROUNDINGS:,} is the most that rounding is taken for: one of two is wrong"
        )
    prefill = [step for step in steps if step.prefill]
    # What is judged was reordered in every step: how loud that is, only the null's steps say in which something was.
    changed = [step for step in decode if step.widest > RESOLUTION]
    floor = QUIET * float(np.median([step.widest for step in changed]))
    null = _phase(changed, changed, floor, shapes)
    identical = {(step.prompt, step.bin) for step in decode} - {(row.prompt, row.bin) for row in null.rows}
    rows = tuple(Row(prompt=prompt, bin=bin_, mean=null.level, n=1) for prompt, bin_ in sorted(identical))
    first = pairs[0].baseline
    return Band(
        name=name, dtype=first.dtype, model=model, workload_key=first.workload_key, sources=sources, floor=floor,
        prefill=_phase(prefill, changed, floor, shapes),
        decode=null.model_copy(update={"rows": null.rows + rows}), spread=spread,
    )  # fmt: skip


def _source(pair: NullPair, found: Sequence[StepChange]) -> Source:
    """What a pair has to say: `found` are its steps. Most of decode identical: it is listed and not used."""
    # Prefill's token is identical wherever the same kernel ran; decode tells whether anything was reordered.
    changes = [step.widest for step in found if not step.prefill]
    changed = [change for change in changes if change > RESOLUTION]
    identical = 1 - len(changed) / len(changes) if changes else 1.0
    return Source(
        kind=pair.kind, baseline=pair.baseline.cell_id, candidate=pair.candidate.cell_id,
        prompts=len(pair.baseline.answers), steps=len(found), identical=identical, used=identical < MOSTLY,
        median=float(np.median(changed)) if changed else 0.0,
    )  # fmt: skip


def _chosen(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources, without the use of those that are far louder than the quietest one that is used."""
    quietest = min((source.median for source in sources if source.used), default=0.0)
    most = MOST_LOUDER * quietest
    return tuple(
        source.model_copy(update={"used": False, "why": f"its median change is {source.median:.2g} nat, more than "
                                  f"{MOST_LOUDER:g} times the {quietest:.2g} of the quietest pair"})
        if source.used and source.median > most else source
        for source in sources
    )  # fmt: skip


def _phase(steps: Sequence[StepChange], decode: Sequence[StepChange], floor: float, shapes: Shapes) -> PhaseBand:
    """The null of `steps`. Tails come from all of decode: prefill gives one step a prompt, too few for a tail."""
    scale = _scale(steps, decode)
    change = fit_tail([step.widest for step in decode], shapes.change)
    distance = fit_tail([step.distance for step in decode], shapes.distance)
    rows = _rows(steps, floor)
    logs = [math.log(max(step.widest, floor)) for step in steps]
    return PhaseBand(
        change=change.scaled(scale),
        distance=distance.scaled(scale),
        level=float(np.mean(logs)),
        sd=_within(steps, rows, floor),
        between=float(np.std([row.mean for row in rows])),
        kl=float(np.mean([step.kl for step in steps])),
        forced=float(np.mean([step.change for step in steps])),
        agreement=float(np.mean([step.same_best for step in steps])),
        n=len(steps),
        rows=rows,
        curve=_curve(steps),
    )


def _scale(steps: Sequence[StepChange], decode: Sequence[StepChange]) -> float:
    """How much louder than decode these steps are, at least 1: what is identical by luck must not narrow a band."""
    if steps is decode:
        return 1.0
    mine, theirs = (float(np.median([step.widest for step in some])) for some in (steps, decode))
    return max(1.0, mine / theirs)


def _by_row(steps: Iterable[StepChange], floor: float) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for step in steps:
        found[step.prompt, step.bin].append(math.log(max(step.widest, floor)))
    return found


def _rows(steps: Iterable[StepChange], floor: float) -> tuple[Row, ...]:
    return tuple(
        Row(prompt=prompt, bin=bin_, mean=float(np.mean(logs)), n=len(logs))
        for (prompt, bin_), logs in _by_row(steps, floor).items()
    )


def _within(steps: Iterable[StepChange], rows: Sequence[Row], floor: float) -> float:
    """Standard deviation of log changes around the mean of their row."""
    squares, degrees = 0.0, 0
    for logs in _by_row(steps, floor).values():
        squares += float(np.sum((np.array(logs) - np.mean(logs)) ** 2))
        degrees += len(logs) - 1
    if not degrees:  # one step a row: around the mean of all
        return float(np.std([row.mean for row in rows], ddof=1)) if len(rows) > 1 else 0.0
    return math.sqrt(squares / degrees)


def _curve(steps: Sequence[StepChange]) -> tuple[Curve, ...]:
    found: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        found[step.bin].append(step.kl)
    return tuple(
        Curve(bin=bin_, kl=float(np.mean(kls)), worst=max(kls), n=len(kls)) for bin_, kls in sorted(found.items())
    )

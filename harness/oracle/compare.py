"""Two transcripts -> the differences of every step, as plain arrays. No judgement here.

Steps are compared on identical prefixes only. A candidate that was made to follow the baseline's tokens is compared to
the end; one that chose freely (a baseline against TP1), up to and with the step at which the two part.
"""

import math
from typing import NamedTuple

from harness.transcript import Answer, Step, Transcript


class StepChange(NamedTuple):
    """One step of one prompt, candidate against baseline. Nats; infinite where the candidate's numbers are no numbers.

    `change`: |Δ logprob| of the imposed token. `widest`: largest |Δ logprob| over tokens in both lists, or the least
    that a token missing from one list must have changed. `margin`: between the baseline's best two tokens.
    """

    prompt: str
    kind: str
    step: int
    position: int
    change: float
    widest: float
    kl: float
    margin: float
    same_best: bool


class Missing(NamedTuple):
    """A prompt whose answer is absent, short, or to other tokens; `reason` says how."""

    prompt: str
    reason: str


class Comparison(NamedTuple):
    steps: list[StepChange]
    missing: list[Missing]


def compare(baseline: Transcript, candidate: Transcript) -> Comparison:
    """Every step of the baseline against the candidate's. Whatever the candidate did not answer is `missing`."""
    answers = {answer.prompt: answer for answer in candidate.answers}
    steps: list[StepChange] = []
    missing: list[Missing] = []
    for reference in baseline.answers:
        answer = answers.get(reference.prompt)
        if not reference.steps:
            missing.append(Missing(reference.prompt, "the baseline has no answer to it"))
            continue
        if answer is None or not answer.steps:
            missing.append(Missing(reference.prompt, "no answer"))
            continue
        compared = _common(reference, answer)
        steps += [_change(reference, answer, index) for index in range(compared)]
        if compared < len(reference.steps) and not answer.forced and compared < len(answer.steps):
            # Both chose freely and parted here: the prefix of this step is still the same, that of later ones is not.
            steps.append(_change(reference, answer, compared))
        elif compared < len(reference.steps):
            said = f"only {compared} of {len(reference.steps)} steps on the same tokens"
            missing.append(Missing(reference.prompt, said))
    return Comparison(steps, missing)


def _common(reference: Answer, answer: Answer) -> int:
    """Steps whose prefix, and whose own token, are the same."""
    pairs = zip(reference.steps, answer.steps, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a.token_id != b.token_id), min(len(reference.steps), len(answer.steps))
    )


def _change(reference: Answer, answer: Answer, index: int) -> StepChange:
    a, b = reference.steps[index], answer.steps[index]
    best = sorted(a.top.values(), reverse=True)
    return StepChange(
        prompt=reference.prompt,
        kind=reference.kind,
        step=index,
        position=reference.prompt_length + index,
        change=_distance(a.logprob, b.logprob if a.token_id == b.token_id else b.top.get(a.token_id, -math.inf)),
        widest=widest(a, b),
        kl=divergence(a, b),
        margin=best[0] - best[1] if len(best) > 1 else math.inf,
        same_best=bool(b.top) and _best(a) == _best(b),
    )


def widest(a: Step, b: Step) -> float:
    """Largest |Δ logprob| over the tokens of both lists.

    A token that only one list holds lies, in the other, at or below that list's last entry: it changed at least by
    what it stands above that entry, and at least by nothing.
    """
    if not a.top or not b.top or not _finite(a) or not _finite(b):
        return math.inf
    floor_a, floor_b = min(a.top.values()), min(b.top.values())
    changes = [abs(a.top[token] - b.top[token]) for token in a.top.keys() & b.top.keys()]
    changes += [max(0.0, a.top[token] - floor_b) for token in a.top.keys() - b.top.keys()]
    changes += [max(0.0, b.top[token] - floor_a) for token in b.top.keys() - a.top.keys()]
    return max(changes)


def divergence(a: Step, b: Step) -> float:
    """KL(a || b) in nats over the tokens in both lists, everything else in one bucket."""
    if not a.top or not b.top or not _finite(a) or not _finite(b):
        return math.inf
    shared = sorted(a.top.keys() & b.top.keys())
    p = [math.exp(a.top[token]) for token in shared]
    q = [math.exp(b.top[token]) for token in shared]
    # A full distribution leaves nothing; the tiny floor keeps rounding from making the rest negative.
    p.append(max(1.0 - sum(p), 1e-12))
    q.append(max(1.0 - sum(q), 1e-12))
    return max(0.0, sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0 and y > 0))


def _best(step: Step) -> int:
    return max(step.top, key=lambda token: step.top[token])


def _distance(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _finite(step: Step) -> bool:
    return all(math.isfinite(value) for value in step.top.values())

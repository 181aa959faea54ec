"""Two transcripts -> the differences of every step, as plain values. No judgement here.

Steps are compared on identical prefixes only. A candidate that was made to follow the baseline's tokens is compared to
the end; one that chose freely (a baseline against TP1, an engine without forcing), up to and with the step at which the
two part.
"""

import math
from collections import Counter
from typing import NamedTuple

from harness.transcript import Answer, Step, Transcript

#: A rest (1 - the sum of the top tokens) below this is taken as this: it is a difference of rounded numbers.
LEAST_REST = 1e-3
FIRST_BIN = 16
BIN_FACTOR = 4
PLACES = 4  # places of a batch that are told apart as one group


class StepChange(NamedTuple):
    """One step of one prompt, candidate against baseline. Nats; infinite where the candidate's numbers are no numbers.

    `place`: the prompt's place in its batch, from 1; 0: it went alone. `position`: of the predicted token.
    `change`: |Δ logprob| of the imposed token; `loss`: baseline's minus candidate's logprob of it. `widest`: largest
    |Δ logprob| over tokens in both lists, or the least that a token missing from one list must have changed.
    `margin`: between the baseline's best two tokens. `rank`: of the baseline's best token in the candidate (1: best;
    k + 1: not in its list).
    """

    prompt: str
    kind: str
    place: int
    step: int
    position: int
    change: float
    loss: float
    widest: float
    kl: float
    margin: float
    same_best: bool
    rank: int

    @property
    def prefill(self) -> bool:
        return self.step == 0

    @property
    def distance(self) -> float:
        """sqrt(2 KL): a change in nats, as `widest` is, weighted by probability."""
        return math.sqrt(2 * self.kl)

    @property
    def bin(self) -> int:
        return position_bin(self.position)

    @property
    def groups(self) -> tuple[str, str, str]:
        """The groups that this step is counted in: prompt class, position, batch place."""
        return (f"class {self.kind}", f"positions {bin_name(self.bin)}", place_name(self.place))


class Missing(NamedTuple):
    """A prompt whose answer is absent, short, to other tokens or with too few of them; `reason` says how."""

    prompt: str
    reason: str


class Parted(NamedTuple):
    """A prompt whose candidate chose freely and left the baseline's tokens: compared up to and with `step`."""

    prompt: str
    step: int
    steps: int


class Comparison(NamedTuple):
    """`forced`: every answer was made to follow; then `parted` is empty."""

    steps: list[StepChange]
    missing: list[Missing]
    parted: list[Parted]
    forced: bool


def compare(baseline: Transcript, candidate: Transcript) -> Comparison:
    """Every step of the baseline against the candidate's. Whatever the candidate did not answer is `missing`."""
    answers = {answer.prompt: answer for answer in candidate.answers}
    places = _places(baseline)
    steps: list[StepChange] = []
    missing: list[Missing] = []
    parted: list[Parted] = []
    for reference in baseline.answers:
        answer = answers.get(reference.prompt)
        if not reference.steps:
            missing.append(Missing(reference.prompt, "the baseline has no answer to it"))
            continue
        if answer is None or not answer.steps:
            missing.append(Missing(reference.prompt, "no answer"))
            continue
        place = places[reference.prompt]
        compared = _common(reference, answer)
        short = next((i for i in range(compared) if len(answer.steps[i].top) < len(reference.steps[i].top)), None)
        if short is not None:  # what a list lacks could not differ
            compared = short
            listed = f"step {short} lists {len(answer.steps[short].top)} tokens of {len(reference.steps[short].top)}"
            missing.append(Missing(reference.prompt, listed))
        steps += [_change(reference, answer, index, place) for index in range(compared)]
        if short is not None:
            continue
        if compared < len(reference.steps) and not answer.forced and compared < len(answer.steps):
            # Both chose freely and parted here: the prefix of this step is still the same, that of later ones is not.
            steps.append(_change(reference, answer, compared, place))
            parted.append(Parted(reference.prompt, compared, len(reference.steps)))
        elif compared < len(reference.steps):
            said = f"only {compared} of {len(reference.steps)} steps on the same tokens"
            missing.append(Missing(reference.prompt, said))
    asked = [answers[answer.prompt] for answer in baseline.answers if answer.prompt in answers]
    return Comparison(steps, missing, parted, bool(asked) and all(answer.forced for answer in asked))


def position_bin(position: int) -> int:
    """0 for positions below 16, then one more for each factor of 4: 16-63, 64-255, 256-1023, …"""
    found, end = 0, FIRST_BIN
    while position >= end:
        found, end = found + 1, end * BIN_FACTOR
    return found


def bin_ends(found: int) -> tuple[int, int]:
    """First position of a bin and the first behind it."""
    end = FIRST_BIN * BIN_FACTOR**found
    return (end // BIN_FACTOR if found else 0), end


def bin_name(found: int) -> str:
    low, end = bin_ends(found)
    return f"{low}-{end - 1}"


def place_name(place: int) -> str:
    if place == 0:
        return "alone"
    first = (place - 1) // PLACES * PLACES + 1
    return f"batch places {first}-{first + PLACES - 1}"


def _places(transcript: Transcript) -> dict[str, int]:
    """Place of each prompt in its batch, from 1 in the order of the transcript; 0 for those that went alone."""
    seen: Counter[int] = Counter()
    found = {}
    for answer in transcript.answers:
        seen[answer.batch] += 1
        found[answer.prompt] = seen[answer.batch] if answer.batch else 0
    return found


def _common(reference: Answer, answer: Answer) -> int:
    """Steps whose prefix, and whose own token, are the same."""
    pairs = zip(reference.steps, answer.steps, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a.token_id != b.token_id), min(len(reference.steps), len(answer.steps))
    )


def _change(reference: Answer, answer: Answer, index: int, place: int) -> StepChange:
    a, b = reference.steps[index], answer.steps[index]
    best = sorted(a.top.values(), reverse=True)
    there = b.logprob if a.token_id == b.token_id else b.top.get(a.token_id, -math.inf)
    loss = a.logprob - there if math.isfinite(a.logprob) and math.isfinite(there) else math.inf
    rank = rank_of_best(a, b)
    return StepChange(
        prompt=reference.prompt,
        kind=reference.kind,
        place=place,
        step=index,
        position=reference.prompt_length + index,
        change=abs(loss),
        loss=loss,
        widest=widest(a, b),
        kl=divergence(a, b),
        margin=best[0] - best[1] if len(best) > 1 else math.inf,
        same_best=rank == 1,
        rank=rank,
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
    """KL(a || b) in nats over the top tokens of `a`, everything else in one bucket.

    A token that `b` does not list is taken at b's last entry, which is the most that it can have there. Each term is
    p · (exp(Δ) - 1 - Δ) with Δ = log q - log p: the same sum, because p and q both sum to 1, but every term is positive
    and of second order, so that nothing cancels where the two agree to 1e-6 nat.
    """
    if not a.top or not b.top or not _finite(a) or not _finite(b):
        return math.inf
    least = min(b.top.values())
    logs = [(a.top[token], b.top.get(token, least)) for token in sorted(a.top)]
    rest = [max(1.0 - math.fsum(math.exp(pair[side]) for pair in logs), LEAST_REST) for side in (0, 1)]
    logs.append((math.log(rest[0]), math.log(rest[1])))
    return math.fsum(math.exp(p) * (math.expm1(q - p) - (q - p)) for p, q in logs)


def rank_of_best(a: Step, b: Step) -> int:
    """Rank in `b` of the best token of `a`: 1 is the best, one more than the list where it is not there."""
    best = max(a.top, key=lambda token: a.top[token], default=None)
    if best not in b.top or not _finite(b):
        return len(b.top) + 1
    return 1 + sum(value > b.top[best] for value in b.top.values())


def _finite(step: Step) -> bool:
    return all(map(math.isfinite, step.top.values()))

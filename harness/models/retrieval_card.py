"""What a retrieval model is worth, in numbers: `python -m harness.models.retrieval_card [--far] [NAME …]`.

Margins: gap in nats between the right answer and the next best token, over depths of the needle, in fp32 and bf16;
rounding: the largest change of a top-20 logprob against fp64. Sensitivity, at one decode step in fp32: what the answer
loses when the shard that holds it is masked, and the largest change of a top-20 logprob when another shard is masked,
partial results are merged by wrong weights, or one query head is silent.
"""

import sys

import numpy as np
import torch

from harness.frozen import Frozen
from harness.models.codes import KEYS, VALUES
from harness.models.network import Network, Wound
from harness.models.recipe import RECIPES, Recipe, find
from harness.models.retrieval import Needle, Question, make_prompt, place_in_shard, shard
from harness.models.stream import Retrieval

LENGTHS = (16, 100, 1000, 4000, 8000)
FAR = 131072
WINDOW = 64  # of layer 0 at FAR; all beyond it gets less than FAR * exp(-gap) of its attention
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Margin(Frozen):
    """Questions of one length and dtype: how many were asked and answered right, and by how much, in nats."""

    length: int
    dtype: str
    asked: int
    right: int
    smallest: float
    median: float
    logprob: float  # of the right answer, median
    rounding: float | None  # None where fp64 was not run


class Sensitivity(Frozen):
    """Smallest effect over questions and ranks (heads: over heads too), in nats, of one defect in one decode step."""

    length: int
    kvp: int
    interleave: int
    own_shard_loss: float  # what the right answer's logprob loses; `flips` is the share of answers that change
    shard_losses: tuple[float, ...]  # the same of each rank in turn, whose shard holds the answer and is masked
    flips: float
    other_shard: float
    base_2: float
    equal_weights: float
    silent_head: tuple[float, ...]  # one of each layer
    tie: float  # two values of one key in two shards: change when they are weighted the same


class RetrievalCard(Frozen):
    name: str
    margins: tuple[Margin, ...]
    sensitivity: tuple[Sensitivity, ...]


def card(
    recipe: Recipe | str,
    lengths: tuple[int, ...] = LENGTHS,
    depths: int = 5,
    shards: tuple[tuple[int, int], ...] = ((2, 1), (2, 16), (4, 1)),
    at: int = 400,
    exact: int = 1000,
) -> RetrievalCard:
    """The numbers at `lengths`, with `depths` needles each; `shards` are (kvp, interleave) at length `at`.

    Rounding is measured up to length `exact`, where fp64 is quick. RAM: about 1 GiB at 8k tokens.
    """
    made = find(recipe) if isinstance(recipe, str) else recipe
    arrays = made.weights()
    nets = {name: Network(made, arrays, dtype) for name, dtype in DTYPES.items()}
    margins = [margin for length in lengths for margin in _margins(nets, length, depths, exact)]
    hurt = tuple(sensitivity(nets["float32"], at, kvp, interleave) for kvp, interleave in shards)
    return RetrievalCard(name=made.name, margins=tuple(margins), sensitivity=hurt)


def far(recipe: Recipe | str, dtype: str = "float32", length: int = FAR, depths: int = 3) -> Margin:
    """Margins at 128k tokens, or another `length`: layer 0 sees its last tokens only, layer 1 all.

    What layer 0 does not see has less than rounding of its attention. At 128k tokens RAM is 3 GiB in fp32 (MLA 6).
    """
    made = find(recipe) if isinstance(recipe, str) else recipe
    nets = {dtype: Network(made, dtype=DTYPES[dtype], window=WINDOW)}
    return _margins(nets, length, depths, 0)[0]


def _questions(made: Recipe, length: int, depths: int) -> list[Question]:
    keys = np.linspace(0, len(KEYS) - 1, depths).astype(int)
    places = np.linspace(0, 1, depths)
    pairs = zip(places, keys, strict=True)
    return [
        make_prompt(made, length, [Needle(float(place), KEYS[int(key)], VALUES[int(key) // 2])], KEYS[int(key)], step)
        for step, (place, key) in enumerate(pairs)
    ]


def _margins(nets: dict[str, Network], length: int, depths: int, exact: int) -> list[Margin]:
    recipe = next(iter(nets.values())).recipe
    questions = _questions(recipe, length, depths)
    truth = [nets["float64"].logprobs(q.tokens)[0] for q in questions] if length <= exact else None
    found = []
    for name in (name for name in nets if name != "float64" or len(nets) == 1):
        rows = [nets[name].logprobs(question.tokens)[0] for question in questions]
        gaps = [margin(row, question.expected[0]) for row, question in zip(rows, questions, strict=True)]
        found.append(
            Margin(
                length=length,
                dtype=name,
                asked=len(gaps),
                right=sum(gap > 0 for gap in gaps),
                smallest=min(gaps),
                median=float(np.median(gaps)),
                logprob=float(np.median([row[q.expected[0]] for row, q in zip(rows, questions, strict=True)])),
                rounding=max(change(a, b) for a, b in zip(truth, rows, strict=True)) if truth else None,
            )
        )
    return found


def sensitivity(net: Network, length: int, kvp: int, interleave: int) -> Sensitivity:
    """One needle in each rank's shard in turn; the last token's step is hurt, what came before is whole."""
    made, since = net.recipe, length - 1
    loss, flips, other, base_2, equal = [], [], [], [], []
    silent: list[list[float]] = [[] for _ in range(made.layers)]
    for rank in range(kvp):
        place = place_in_shard(length, kvp, interleave, rank, (rank + 0.5) / kvp)
        question = make_prompt(made, length, [Needle(place, KEYS[7 * rank], VALUES[50])], KEYS[7 * rank], rank)
        answer = question.expected[0]
        whole = net.logprobs(question.tokens)[0]

        def hurt(question: Question = question, **wound) -> np.ndarray:
            return net.logprobs(question.tokens, wound=Wound(since=since, kvp=kvp, interleave=interleave, **wound))[0]

        for hidden in range(kvp):
            row = hurt(hide=shard(length, kvp, interleave, hidden))
            if hidden == rank:
                loss.append(float(whole[answer] - row[answer]))
                flips.append(float(row.argmax() != answer))
            else:
                other.append(change(whole, row))
        base_2.append(change(whole, hurt(merge="base-2")))
        equal.append(change(whole, hurt(merge="equal")))
        if rank == 0:
            for layer in range(made.layers):
                silent[layer] += [change(whole, hurt(silent=(layer, head))) for head in range(made.heads)]
    twin = _twins(made, length, kvp, interleave)
    tied = net.logprobs(twin.tokens, wound=Wound(since=since, kvp=kvp, interleave=interleave, merge="equal"))[0]
    return Sensitivity(
        length=length,
        kvp=kvp,
        interleave=interleave,
        own_shard_loss=min(loss),
        shard_losses=tuple(loss),
        flips=float(np.mean(flips)),
        other_shard=min(other),
        base_2=min(base_2),
        equal_weights=min(equal),
        silent_head=tuple(min(changes) for changes in silent),
        tie=change(net.logprobs(twin.tokens)[0], tied),
    )


def _twins(made: Recipe, length: int, kvp: int, interleave: int) -> Question:
    """One key with a strong and a weak value in the first and the last rank's shard."""
    ends = [place_in_shard(length, kvp, interleave, rank, depth) for rank, depth in ((0, 0.25), (kvp - 1, 0.75))]
    values = (VALUES[-1], VALUES[0])
    needles = [Needle(place, KEYS[3], value) for place, value in zip(ends, values, strict=True)]
    return make_prompt(made, length, needles, KEYS[3], decoys=0)


def margin(row: np.ndarray, answer: int) -> float:
    """Nats by which `answer` beats every other token of a row of logprobs; negative where it does not."""
    return float(row[answer] - np.delete(row, answer).max())


def change(whole: np.ndarray, row: np.ndarray) -> float:
    """The largest change, in nats, of the logprobs of the top 20 tokens of `whole`."""
    top = np.argsort(whole)[-20:]
    return float(np.abs(whole[top] - row[top]).max())


def main(arguments: list[str]) -> None:
    names = [name for name in arguments if not name.startswith("--")]
    for name in names or sorted(name for name, made in RECIPES.items() if isinstance(made, Retrieval)):
        if "--far" in arguments:
            rows = [far(name, dtype) for dtype in ("float32", "bfloat16")]
            hurt: tuple[Sensitivity, ...] = ()
        else:
            made = card(name)
            rows, hurt = list(made.margins), made.sensitivity
        print(f"{name}\n  {'length':>7} {'dtype':9} right    margin min  median  logprob  rounding")
        for row in rows:
            rounding = "-" if row.rounding is None else f"{row.rounding:.1e}"
            print(f"  {row.length:7} {row.dtype:9} {row.right:2} of {row.asked:2} {row.smallest:10.2f} ", end="")
            print(f"{row.median:7.2f} {row.logprob:8.3f}  {rounding:>8}")
        for row in hurt:
            heads = " ".join(f"{value:.3f}" for value in row.silent_head)
            print(
                f"  KVP {row.kvp} interleave {row.interleave} at {row.length}: own shard -{row.own_shard_loss:.2f} ",
                end="",
            )
            print(f"(flips {row.flips:.0%}), other {row.other_shard:.3f}, base 2 {row.base_2:.3f}, ", end="")
            print(f"equal {row.equal_weights:.3f}, silent head {heads}, tie {row.tie:.3f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

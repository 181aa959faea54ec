"""What a recipe is worth as a test model, in numbers: `python -m harness.models.card [NAME …]`.

Margins: gap in nats between the best two tokens at each greedy step (a near-tie would make rounding look like a
defect). Distinct: share of distinct tokens (a loop of one token tests nothing). Sensitivity: the largest change of any
top-20 logprob when attention does not see one context token, or one shard of two (a defect must show).
"""

import sys

import numpy as np

from harness.frozen import Frozen
from harness.models.forward import Forward
from harness.models.recipe import RECIPES, Recipe, find
from harness.models.stream import Retrieval

STEPS = 24


class Card(Frozen):
    """Numbers of one prompt length; logprob changes are in nats."""

    name: str
    length: int
    margin_p5: float
    margin_median: float
    near_ties: float  # share of steps whose margin is below 0.1 nat
    distinct: float
    one_token: float  # median over hidden tokens of the largest change
    one_shard: float  # smallest change over steps when every second token is hidden
    one_shard_median: float


def measure(recipe: Recipe, length: int, steps: int = STEPS, seed: int = 0, probes: int = 6) -> Card:
    """Greedy decode of `steps` tokens after `length` random ones, then the same tokens with parts hidden."""
    random = np.random.Generator(np.random.PCG64([seed, length]))
    prompt = random.integers(4, recipe.vocab, size=length)
    arrays = recipe.weights()
    model = Forward(recipe, arrays)
    rows = [model.logprobs(prompt)[-1]]
    for _ in range(steps - 1):
        rows.append(model.logprobs(np.array([rows[-1].argmax()]))[-1])
    full = np.array(rows)
    tokens = full.argmax(axis=-1)
    best = np.sort(full, axis=-1)
    margins = best[:, -1] - best[:, -2]
    top = np.argsort(full, axis=-1)[:, -20:]

    def change(hide: tuple[int, ...]) -> np.ndarray:
        """Largest top-20 change of each step when positions `hide` are not seen."""
        seen = Forward(recipe, arrays, hide).logprobs(np.concatenate([prompt, tokens[:-1]]))[length - 1 :]
        return np.abs(np.take_along_axis(seen, top, 1) - np.take_along_axis(full, top, 1)).max(axis=1)

    places = random.choice(length, size=min(probes, length), replace=False)
    shard = change(tuple(range(0, length, 2)))
    return Card(
        name=recipe.name,
        length=length,
        margin_p5=float(np.percentile(margins, 5)),
        margin_median=float(np.median(margins)),
        near_ties=float((margins < 0.1).mean()),
        distinct=len(set(tokens.tolist())) / steps,
        one_token=float(np.median([change((int(place),)).max() for place in places])),
        one_shard=float(shard.min()),
        one_shard_median=float(np.median(shard)),
    )


def main(names: list[str]) -> None:
    print(f"{'recipe':10} {'length':>6} {'margin p5':>9} {'median':>7} {'<0.1':>5} {'distinct':>8} ", end="")
    print(f"{'1 token':>8} {'shard min':>9} {'median':>7}")
    for name in names or sorted(name for name, made in RECIPES.items() if not isinstance(made, Retrieval)):
        for length in (3, 17, 64, 256, 1000):
            card = measure(find(name), length)
            print(
                f"{card.name:10} {length:6} {card.margin_p5:9.3f} {card.margin_median:7.3f} {card.near_ties:5.2f} ",
                end="",
            )
            print(f"{card.distinct:8.2f} {card.one_token:8.4f} {card.one_shard:9.3f} {card.one_shard_median:7.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])

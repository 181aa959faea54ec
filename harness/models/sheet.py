"""The card of a recipe's model as a run records it: what it is, how far its answers are from a tie, what it notices.

Measured by `retrieval_card.py` and `card.py`, once a recipe: kept beside the models in the cache.
"""

import json
import os
from pathlib import Path

from pydantic import ValidationError

from harness.frozen import Frozen, content_hash
from harness.models.recipe import PREFIX, Recipe, cache_root, find
from harness.models.stream import Retrieval

#: Part of a kept card's name; raise it when what is measured changes.
VERSION = 2
LENGTHS = (100, 1000)  # of a retrieval model's prompts
LONG = 8000  # the same in fp32 only, at both ends of the context: half a second a prompt
SHARDS = ((2, 1), (4, 16))  # (KVP, interleave)
AT = 300  # tokens, where shards are masked
RANDOM_LENGTH = 256


class Measure(Frozen):
    """One number of a card: nats, unless its unit says otherwise."""

    name: str
    value: float
    unit: str
    note: str = ""


class ModelCard(Frozen):
    """`margins`: how far the right answer is ahead, and what rounding does. `sensitivity`: what a defect changes."""

    model: str
    shape: str
    kind: str
    margins: tuple[Measure, ...]
    sensitivity: tuple[Measure, ...]


def card_of(model: str) -> ModelCard:
    """The card of `recipe:NAME`, measured now (some seconds) if it is not in the cache. KeyError for no recipe."""
    made = find(model)
    path = _kept(made)
    try:
        return ModelCard.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        found = _looks_up(made) if isinstance(made, Retrieval) else _random(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(found.model_dump_json())
    scratch.replace(path)
    return found


def _kept(made: Recipe) -> Path:
    measured = content_hash([VERSION, LENGTHS, LONG, SHARDS, AT, RANDOM_LENGTH])
    return cache_root().parent / "cards" / f"{made.name}-{made.key}-{measured}.json"


def _shape(made: Recipe) -> str:
    config = made.config()
    layers = config["num_hidden_layers"]
    cached = "one latent" if "kv_lora_rank" in config else f"{config['num_key_value_heads']} KV heads"
    told = [config["architectures"][0], f"{layers} layers", f"{config['num_attention_heads']} query heads", cached]
    told.append(f"hidden {config['hidden_size']}")
    dense = config.get("first_k_dense_replace", layers)
    if dense < layers:
        told.append(f"{config['n_routed_experts']} experts from layer {dense} on")
    elif "num_experts" in config:
        told.append(f"{config['num_experts']} experts")
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        told.append(f"{rope['rope_type']} x {rope['factor']:g}")
    return ", ".join([*told, f"vocabulary {config['vocab_size']}"])


def _looks_up(made: Recipe) -> ModelCard:
    import torch

    from harness.models.retrieval_card import card, far

    torch.set_num_threads(
        1
    )  # of this thread: cards are measured side by side, and two that share cores stall each other
    found = card(made, lengths=LENGTHS, depths=3, shards=SHARDS, at=AT)
    margins, sensitivity = [], []
    for row in (*found.margins, far(made, length=LONG, depths=2)):
        at = f"{row.dtype}, {row.length} tokens"
        right = f"{row.right} of {row.asked} right; median {row.median:.2f}"
        margins.append(Measure(name=f"smallest margin, {at}", value=row.smallest, unit="nat", note=right))
        if row.rounding is not None:
            margins.append(Measure(name=f"rounding against fp64, {at}", value=row.rounding, unit="nat"))
    for hurt in found.sensitivity:
        at = f"KVP {hurt.kvp}, interleave {hurt.interleave}"
        flips = f"{hurt.flips:.0%} of the answers change"
        sensitivity += [
            *(
                Measure(
                    name=f"rank {rank}'s shard masked, with the answer in it, {at}", value=loss, unit="nat", note=flips
                )
                for rank, loss in enumerate(hurt.shard_losses)
            ),
            Measure(name=f"another shard masked, {at}", value=hurt.other_shard, unit="nat"),
            Measure(name=f"partials merged as base 2, {at}", value=hurt.base_2, unit="nat"),
            Measure(name=f"partials weighted equally, {at}", value=hurt.equal_weights, unit="nat"),
            Measure(name=f"one query head silent, {at}", value=min(hurt.silent_head), unit="nat"),
        ]
    return ModelCard(
        model=PREFIX + made.name,
        shape=_shape(made),
        kind="looks up values: the next token after a key is its value, which lies in one shard",
        margins=tuple(margins),
        sensitivity=tuple(sensitivity),
    )


def _random(made: Recipe) -> ModelCard:
    from harness.models.card import STEPS, measure

    found = measure(made, RANDOM_LENGTH)
    at = f"{RANDOM_LENGTH} tokens and {STEPS} of decode"
    return ModelCard(
        model=PREFIX + made.name,
        shape=_shape(made),
        kind="random weights, sized so that the context outweighs the last token",
        margins=(
            Measure(name="5th percentile of margins", value=found.margin_p5, unit="nat", note=at),
            Measure(name="median margin", value=found.margin_median, unit="nat"),
            Measure(name="steps with a margin below 0.1 nat", value=found.near_ties, unit="share"),
            Measure(name="distinct tokens", value=found.distinct, unit="share"),
        ),
        sensitivity=(
            Measure(name="one context token masked, median", value=found.one_token, unit="nat"),
            Measure(name="one shard of two masked, smallest", value=found.one_shard, unit="nat"),
            Measure(name="one shard of two masked, median", value=found.one_shard_median, unit="nat"),
        ),
    )


def main(names: list[str]) -> None:
    """`python -m harness.models.sheet NAME …` prints cards as JSON."""
    for name in names:
        print(json.dumps(card_of(name).model_dump(), indent=2))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

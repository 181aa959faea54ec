"""Prompts for the models that look things up, and the answers that they must give.

A prompt is `<s>`, filler words, `key value` pairs scattered among them, and a key at the end. The next token is that
key's value; after value i the model looks up key i, so the answer goes on for as long as there are pairs: a chain of
pairs makes every decode step read another place of the context, one that the test names.

Decoys share the attention: each key that is asked for also stands before some weaker words elsewhere, which together
take about a fifth of the weight. So the answer's logprob tells how the partial results of the shards were weighted,
even where one shard holds the whole answer. Where there is room, decoy i stands on rank i mod KVP for KVP 2, 4 and 8 at
interleave 1 and 16, so that every shard has one.
"""

from typing import NamedTuple

import numpy as np

from harness.models import codes
from harness.models.codes import BOS, DECOYS, FILLER, KEYS, VALUES
from harness.models.recipe import Recipe, find
from harness.models.stream import Retrieval
from harness.models.weights import filler
from helix_runtime.sharding import owner


class Needle(NamedTuple):
    """`key value` in the context. `place`: the value's position (int), or a depth from 0.0 to 1.0 (float)."""

    place: int | float
    key: int
    value: int


class Question(NamedTuple):
    """A prompt and what greedy decoding must say.

    `expected[0]` is the next token; `places[i]` is the position that holds `expected[i]`, the one that the i-th step
    must read. `pairs` are the positions of all values of asked keys, decoys included.
    """

    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    places: tuple[int, ...]
    pairs: tuple[int, ...]


def make_prompt(
    recipe: Recipe | str, length: int, needles: list[Needle], query: int, seed: int = 0, decoys: int = 4
) -> Question:
    """`length` tokens with `needles` in filler drawn from `seed`, ending with the key `query`.

    A key may have several values: the one with the largest bonus (`bonus_of`) wins, the others take their share. Each
    asked key gets `decoys` weak words, spread evenly, as far as there is room in half of the context. ValueError for
    words of the wrong kind, places that are taken or outside [2, length - 2], and more needles than fit.
    """
    made = _retrieval(recipe)
    needles = [Needle(*needle) for needle in needles]
    if query not in {needle.key for needle in needles}:
        raise ValueError(f"key {query} has no needle; the keys are {sorted({needle.key for needle in needles})}")
    for needle in needles:
        if needle.key not in KEYS or needle.value not in VALUES:
            raise ValueError(f"{needle}: keys are {KEYS.start}..{KEYS.stop - 1}, values {VALUES.start}..{VALUES[-1]}")
    random = np.random.Generator(np.random.PCG64([made.seed, seed, length]))
    tokens = random.integers(FILLER.start, FILLER.stop, size=length)
    tokens[0], tokens[-1] = BOS, query
    free = np.ones(length, dtype=bool)
    free[[0, -1]] = False

    found: dict[int, list[tuple[float, int, int]]] = {}  # key -> (bonus, position, word)
    bonus = bonus_of(made)

    def put(key: int, word: int, position: int) -> None:
        tokens[position - 1 : position + 1] = key, word
        free[position - 1 : position + 1] = False
        found.setdefault(key, []).append((float(bonus[word]), position, word))

    for needle in sorted(needles, key=lambda needle: isinstance(needle.place, float)):  # exact places first
        put(needle.key, needle.value, _position(needle, free))
    asked = _chain(query, found)
    room = (length // 2 - 2 * len(needles)) // (2 * len(asked))
    count = max(0, min(decoys, room))
    words = random.permutation(np.array(DECOYS))
    for step, key in enumerate(key for _ in range(count) for key in asked):
        word = int(words[step % len(words)])
        put(key, word, _spread((step + 0.5) / (count * len(asked)), step // len(asked), free))
    best = [max(found[key]) for key in asked]
    return Question(
        tuple(tokens.tolist()),
        tuple(word for _, _, word in best),
        tuple(position for _, position, _ in best),
        tuple(sorted(position for key in asked for _, position, _ in found[key])),
    )


def make_chain(
    recipe: Recipe | str, length: int, places: list[int | float], seed: int = 0, decoys: int = 2
) -> Question:
    """A prompt whose greedy answer has `len(places)` tokens, of which the i-th stands at `places[i]`."""
    random = np.random.Generator(np.random.PCG64([_retrieval(recipe).seed, seed, length, len(places)]))
    if not 0 < len(places) < len(KEYS):
        raise ValueError(f"a chain has 1..{len(KEYS) - 1} links, not {len(places)}")
    order = random.permutation(len(KEYS))[: len(places) + 1]
    links = zip(places, order, order[1:], strict=False)
    needles = [Needle(place, KEYS[int(key)], VALUES[int(value)]) for place, key, value in links]
    return make_prompt(recipe, length, needles, needles[0].key, seed, decoys)


def place_in_shard(length: int, kvp: int, interleave: int, rank: int, depth: float = 0.5) -> int:
    """The position nearest to `depth` at which a value can stand and that `rank` of `kvp` stores.

    ValueError where the rank stores no such position of `length` tokens.
    """
    wanted = depth * (length - 1)
    mine = [position for position in range(2, length - 1) if owner(position, kvp, interleave) == rank]
    if not mine:
        raise ValueError(
            f"rank {rank} of {kvp} stores no place for a value in {length} tokens, interleave {interleave}"
        )
    return min(mine, key=lambda position: abs(position - wanted))


def shard(length: int, kvp: int, interleave: int, rank: int) -> tuple[int, ...]:
    """The positions of `length` tokens that `rank` of `kvp` stores."""
    return tuple(position for position in range(length) if owner(position, kvp, interleave) == rank)


def bonus_of(recipe: Recipe) -> np.ndarray:
    """Each word's bonus in nats of attention score, `[512]`: of two words after the same key, e^difference to one."""
    _, _, random = filler(recipe.seed)
    codes.codes(random)  # drawn before, from the same generator
    return codes.bonuses(random)


def _retrieval(recipe: Recipe | str) -> Recipe:
    made = find(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(made, Retrieval):
        raise ValueError(f"recipe {made.name!r} has random weights and looks nothing up; take one named *-retrieve*")
    return made


def _chain(query: int, found: dict[int, list[tuple[float, int, int]]]) -> list[int]:
    """The keys that greedy decoding asks for, from `query` on, until one has no pair or comes again."""
    asked: list[int] = []
    while query in found and query not in asked:
        asked.append(query)
        query = KEYS[VALUES.index(max(found[query])[2])]
    return asked


def _spread(depth: float, turn: int, free: np.ndarray) -> int:
    """A free place within 200 tokens of `depth` on rank `turn` of 2, 4 and 8 at interleave 1 and 16, if possible."""
    fits = np.flatnonzero(free[1:] & free[:-1]) + 1
    away = np.abs(fits - depth * (len(free) - 1))
    worse = (fits % 8 != turn % 8) * 2 + (fits // 16 % 8 != turn % 8) * 1
    return int(fits[(worse * 200 + away).argmin()])


def _position(needle: Needle, free: np.ndarray) -> int:
    """The needle's own place if it names one, else the free place nearest to its depth."""
    fits = np.flatnonzero(free[1:] & free[:-1]) + 1
    if isinstance(needle.place, float):
        if not len(fits):
            raise ValueError(f"{needle}: no room left in {len(free)} tokens")
        return int(fits[np.abs(fits - needle.place * (len(free) - 1)).argmin()])
    if needle.place not in fits:
        raise ValueError(f"{needle}: its place is taken, or outside 2..{len(free) - 2}")
    return int(needle.place)

"""The words of a retrieval model and the ±1 codes that stand for them inside it.

Each word has a code of 64 signs in four blocks of 16. A block is a word of the extended Hamming code [16, 11, 4],
another one for each token, so any two tokens differ in at least 4 of any block's 16 signs: an attention head that
compares one block only still tells all tokens apart.
"""

from functools import cache
from itertools import product

import numpy as np

VOCAB = 512
BOS = 1
#: `key value` pairs are made of these; value i, once said, asks for key i, so answers can be chained.
KEYS = range(4, 100)
VALUES = range(100, 196)
#: Stand after a key in place of a value and win a smaller share of attention: they spread it over the context.
DECOYS = range(196, 260)
FILLER = range(260, VOCAB)

BLOCK = 16
CODE = 4 * BLOCK

#: Bonus of a word, in nats of attention score, where it stands after the key looked up: it breaks ties between pairs
#: of the same key. Values are graded, so that two values of one key share attention in a known ratio.
VALUE_BONUS = (2.5, 3.5)
DECOY_BONUS = (0.0, 0.5)
OTHER_BONUS = (0.0, 3.0)


@cache
def hamming() -> np.ndarray:
    """The 2048 words of the extended Hamming code, ±1, `[2048, 16]`; two differ in 4 signs or more."""
    messages = np.array(list(product((0, 1), repeat=11)))
    # Positions 1..15; the powers of two hold parities, so that the syndrome of a word is zero; position 0 is overall.
    words = np.zeros((len(messages), BLOCK), dtype=int)
    data = [place for place in range(1, BLOCK) if place & (place - 1)]
    words[:, data] = messages
    for power in (1, 2, 4, 8):
        words[:, power] = words[:, [place for place in data if place & power]].sum(axis=1) % 2
    words[:, 0] = words.sum(axis=1) % 2
    return 1.0 - 2.0 * words


def codes(random: np.random.Generator, tries: int = 8) -> np.ndarray:
    """A ±1 code for each token, `[512, 64]`; of `tries` draws the one whose most similar two are least similar."""
    best, closest = None, np.inf
    for _ in range(tries):
        drawn = np.concatenate([hamming()[random.permutation(2048)[:VOCAB]] for _ in range(CODE // BLOCK)], axis=1)
        similar = (drawn @ drawn.T - 2 * CODE * np.eye(VOCAB)).max()
        if similar < closest:
            best, closest = drawn, similar
    return best


def asked(code: np.ndarray) -> np.ndarray:
    """What each token looks up, `[512, 64]`: its own code; for value i the code of key i."""
    found = code.copy()
    found[VALUES.start : VALUES.stop] = code[KEYS.start : KEYS.stop]
    return found


def bonuses(random: np.random.Generator) -> np.ndarray:
    """The bonus of each token in nats, `[512]`."""
    bonus = random.uniform(*OTHER_BONUS, size=VOCAB)
    bonus[VALUES.start : VALUES.stop] = np.linspace(*VALUE_BONUS, len(VALUES))
    bonus[DECOYS.start : DECOYS.stop] = np.linspace(*DECOY_BONUS, len(DECOYS))
    return bonus

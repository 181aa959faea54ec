"""The residual stream of a retrieval model: who stands where in it, and all weights but attention's.

`circuit.py` says what the parts are for.
"""

import math
from functools import cached_property

import numpy as np

from harness.frozen import Frozen
from harness.models import codes
from harness.models.codes import CODE, FILLER, VOCAB
from harness.models.weights import Arrays, filler

OWN, ASKED, BEFORE, FOUND = (slice(CODE * part, CODE * (part + 1)) for part in range(4))
BONUS = 4 * CODE  # in units of BONUS_UNIT nats
ROUTER = slice(BONUS + 1, BONUS + 9)
CONSTANT = slice(BONUS + 9, BONUS + 25)
WIDTH = BONUS + 25
BONUS_UNIT = 4.0
LEVEL = 8.0  # of the 16 constant elements
#: What a token's top two experts and the six others see in *router*; times ROUTER_GAIN it is the router's logits.
ROUTES = (1.0, 0.5, *[-0.5] * 6)
ROUTER_GAIN = 4.0


class Retrieval(Frozen):
    """The circuit's dials. `gap` and `match` are attention scores in nats, `mlp` and `echo` are logits in nats, RMS.

    `match` is the score of the token looked up against 0 for an unrelated one, half of it for the nearest other code.
    """

    gap: float = 24.0
    self_share: float = 0.003
    match: float = 32.0
    mlp: float = 0.2
    echo: float = 0.5


class Stream:
    """What both attention families share: codes, embedding, norms, MLPs and head of one model."""

    def __init__(self, dials: Retrieval, seed: int, hidden: int, contrast: float):
        if hidden < WIDTH:
            raise ValueError(f"the circuit needs a hidden size of at least {WIDTH}, not {hidden}")
        self.dials, self.hidden, self.contrast = dials, hidden, contrast
        self.normal, self.ones, self.random = filler(seed)
        self.code = codes.codes(self.random)
        self.bonus = codes.bonuses(self.random)

    @cached_property
    def _squares(self) -> float:
        """Sum of squares of an embedding; the bonus, at most 1, is left out."""
        return 2 * CODE + 16 * LEVEL**2 + float(np.square(ROUTES).sum())

    def ends(self) -> Arrays:
        """Embedding, last norm and head."""
        embedding = np.zeros((VOCAB, self.hidden))
        embedding[:, OWN], embedding[:, ASKED] = self.code, codes.asked(self.code)
        embedding[:, BONUS] = self.bonus / BONUS_UNIT
        embedding[:, ROUTER] = [self.random.permutation(ROUTES) for _ in range(VOCAB)]
        embedding[:, CONSTANT] = LEVEL
        head = np.zeros((VOCAB, self.hidden))
        head[:, FOUND] = self.code * self.contrast / CODE
        head[:, BEFORE] = self.random.choice([-1.0, 1.0], size=(VOCAB, CODE)) * self.dials.echo / math.sqrt(CODE)
        return {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": self.ones(self.hidden, self._rms(1.0)),
            "lm_head.weight": head,
        }

    def norms(self, at: str, layer: int) -> Arrays:
        """Weights that undo RMSNorm's division: the circuit sees the stream as it is."""
        return {
            at + "input_layernorm.weight": self.ones(self.hidden, self._rms(layer > 0)),
            at + "post_attention_layernorm.weight": self.ones(self.hidden, self._rms(1.0)),
        }

    def _rms(self, written: float) -> float:
        squares = self._squares + written * CODE * kept(self.dials.self_share)
        return math.sqrt(squares / self.hidden)

    def dense(self, at: str, width: int, part: float = 1.0) -> Arrays:
        """An MLP of the codes that adds `part` of `mlp` nats of noise to the logits, by way of *found*."""
        gate, up = (self._codes_only(width) for _ in range(2))
        # The product of silu(a) and b has RMS 0.6 for a, b of unit RMS; the head adds 64 of its elements up.
        size = part * self.dials.mlp / (0.6 * self.contrast / math.sqrt(CODE))
        return {
            at + "gate_proj.weight": gate,
            at + "up_proj.weight": up,
            at + "down_proj.weight": writes(self.normal(CODE, width, size), FOUND, self.hidden),
        }

    def experts(self, at: str, count: int, width: int, shared: bool = True) -> Arrays:
        """A router that reads *router*, so that each token's experts are far apart, and its experts.

        `shared`: an expert of all tokens beside them, as DeepSeek has.
        """
        gate = np.zeros((count, self.hidden))
        gate[:, ROUTER] = np.eye(count) * ROUTER_GAIN
        arrays: Arrays = {at + "gate.weight": gate}
        for expert in range(count):
            arrays |= self.dense(f"{at}experts.{expert}.", width)
        return arrays | (self.dense(at + "shared_experts.", width, 0.5) if shared else {})

    def _codes_only(self, width: int) -> np.ndarray:
        """Rows that read the four codes and not the constant, which would drown them."""
        rows = np.zeros((width, self.hidden))
        rows[:, : 4 * CODE] = self.normal(width, 4 * CODE, 1.0)
        return rows


def kept(self_share: float) -> float:
    """Mean square of an element of *before*, a mix of two independent signs."""
    return (1 - self_share) ** 2 + self_share**2


def reads(matrix: np.ndarray, part: slice, hidden: int) -> np.ndarray:
    """`matrix` `[N, 64]` as a projection of the stream that reads one part of it."""
    whole = np.zeros((len(matrix), hidden))
    whole[:, part] = matrix
    return whole


def writes(matrix: np.ndarray, part: slice, hidden: int) -> np.ndarray:
    """`matrix` `[64, N]` as a projection that writes to one part of the stream."""
    return reads(matrix.T, part, hidden).T.copy()


def constant(values: np.ndarray, hidden: int) -> np.ndarray:
    """A projection `[N, hidden]` whose output is `values` `[N]` for every token."""
    rows = np.zeros((len(values), hidden))
    rows[:, CONSTANT] = values[:, None] / (LEVEL * 16)
    return rows


def padded(arrays: Arrays, vocab: int) -> Arrays:
    """The arrays with `vocab` words. Those beyond the codes read like ordinary ones, and are never said: logit 0."""
    embedding, head = arrays["model.embed_tokens.weight"], arrays["lm_head.weight"]
    more = vocab - len(embedding)
    return arrays | {
        "model.embed_tokens.weight": np.concatenate([embedding, embedding[FILLER.start :][:more]]),
        "lm_head.weight": np.concatenate([head, np.zeros((more, head.shape[1]))]),
    }


def on_grid(arrays: Arrays) -> Arrays:
    """The arrays in fp32, rounded to the nearest bf16 (ties to even)."""
    rounded = {}
    for name, array in arrays.items():
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        rounded[name] = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded

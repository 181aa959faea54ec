"""Models that look things up, with weights constructed, not trained: a two-layer induction circuit.

The residual stream has four subspaces of 64 signs each (`codes.py`): *own* (this token), *asked* (what this token looks
up), *before* (the token before this one; layer 0 writes it) and *found* (the answer; layer 1 writes it, `lm_head`
reads it).

Layer 0 attends to the previous position by rotary embedding alone: constant queries and keys whose score is a sum of
cosines that peaks between distance 0 and 1, so that distance 1 gets `1 - self_share`, distance 0 gets `self_share` and
every other one less than exp(-`gap`) of that. It writes *before*.

Layer 1 compares its *asked* with each position's *before*, in rotary pairs so slow that they stand still over 256k
tokens, adds the bonus of the word that stands there, and copies that word's *own* to *found*.

Values go through a random orthogonal mix, of which every query head writes back its own slice: each head carries a part
of every code, and none can fail unseen. `lm_head` also reads *before* a little, so layer 0 shows in every decode step.
A large constant in the stream keeps the divisor of the norms before attention the same to 0.1 %. All weights are exact
in bf16, so an fp32 and a bf16 server run the same model.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from harness.models.codes import BLOCK, CODE, VOCAB
from harness.models.recipe import Recipe, family, register
from harness.models.stream import (
    ASKED,
    BEFORE,
    BONUS,
    BONUS_UNIT,
    CONSTANT,
    FOUND,
    LEVEL,
    OWN,
    ROUTES,
    WIDTH,
    Retrieval,
    Stream,
    constant,
    kept,
    on_grid,
    padded,
    reads,
    writes,
)
from harness.models.weights import Arrays


class RetrievalRecipe(Retrieval, Recipe):
    """The circuit with grouped-query attention. The first half of the rotary pairs tells positions, the other codes."""

    layers: int = 2
    hidden: int = 288
    intermediate: int = 384
    vocab: int = VOCAB
    positions: int = 262144
    rope_theta: float = 1e13
    contrast: float = 12.0

    def weights(self) -> Arrays:
        stream = Stream(self, self.seed, self.hidden, self.contrast)
        arrays = stream.ends()
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            arrays |= stream.norms(at, layer) | self._feed(at + "mlp.", stream)
            arrays |= self._positions(at + "self_attn.", stream) if layer == 0 else self._lookup(at, stream)
            mix, back = slices(stream.random, self.heads, self.kv_heads, self.head_dim)
            arrays[at + "self_attn.v_proj.weight"] = reads(mix, OWN, self.hidden)
            arrays[at + "self_attn.o_proj.weight"] = writes(back, BEFORE if layer == 0 else FOUND, self.hidden)
        return on_grid(padded(arrays, self.vocab))

    def _feed(self, at: str, stream: Stream) -> Arrays:
        return stream.dense(at, self.intermediate)

    def _positions(self, at: str, stream: "Stream") -> Arrays:
        """Queries and keys of layer 0: constants, with another phase for each KV head."""
        half, share = self.head_dim // 2, self.heads // self.kv_heads
        frequencies = self.rope_theta ** (-np.arange(half) / half)
        use = np.arange(half // 2)[frequencies[: half // 2] > 1e-5]
        amplitude, delay = kernel(frequencies[use], self.gap, self.self_share, self.positions)
        size = math.sqrt(amplitude * math.sqrt(self.head_dim))
        phase = stream.random.uniform(0, 2 * math.pi, size=(self.kv_heads, len(use)))
        q, k = np.zeros((self.kv_heads, self.head_dim)), np.zeros((self.kv_heads, self.head_dim))
        q[:, use], q[:, use + half] = size * np.cos(phase), size * np.sin(phase)
        phase = phase + frequencies[use] * delay
        k[:, use], k[:, use + half] = size * np.cos(phase), size * np.sin(phase)
        return self._projections(
            at,
            constant(np.repeat(q, share, axis=0).ravel(), self.hidden),
            constant(k.ravel(), self.hidden),
            float(np.linalg.norm(q[0])),
            float(np.linalg.norm(k[0])),
        )

    def _lookup(self, at: str, stream: "Stream") -> Arrays:
        """Queries and keys of layer 1: blocks of the codes in the slow pairs, the bonus in the slowest of the fast."""
        dim, half, share = self.head_dim, self.head_dim // 2, self.heads // self.kv_heads
        slow = np.concatenate([np.arange(half // 2, half), np.arange(half // 2, half) + half])  # dim / 2 elements
        size = math.sqrt(self.match * math.sqrt(dim) / len(slow))
        q, k = np.zeros((self.kv_heads, dim, self.hidden)), np.zeros((self.kv_heads, dim, self.hidden))
        for head in range(self.kv_heads):
            compared = (head * BLOCK + np.arange(len(slow))) % CODE
            q[head, slow, compared + ASKED.start] = size
            k[head, slow, compared + BEFORE.start] = size
        gain = math.sqrt(BONUS_UNIT * math.sqrt(dim))
        q[:, half // 2 - 1, CONSTANT] = gain / (LEVEL * 16)
        k[:, half // 2 - 1, BONUS] = gain
        # Only for QK norm: an element that the other side does not have keeps the divisor constant.
        pad = 4 * size * math.sqrt(len(slow)) if self.qk_norm else 0.0
        k[:, 1, CONSTANT] = pad / (LEVEL * 16)
        q_norm = math.hypot(size * math.sqrt(len(slow)), gain)
        k_norm = math.hypot(size * math.sqrt(len(slow) * kept(self.self_share)), pad)
        q, k = np.repeat(q, share, axis=0).reshape(-1, self.hidden), k.reshape(-1, self.hidden)
        return self._projections(at + "self_attn.", q, k, q_norm, k_norm)

    def _projections(self, at: str, q: np.ndarray, k: np.ndarray, q_norm: float, k_norm: float) -> Arrays:
        """`q_norm`, `k_norm`: lengths of one head's query and key, which QK norm must give back."""
        arrays: Arrays = {at + "q_proj.weight": q, at + "k_proj.weight": k}
        if self.qk_norm:
            root = math.sqrt(self.head_dim)
            arrays[at + "q_norm.weight"] = np.full(self.head_dim, q_norm / root)
            arrays[at + "k_norm.weight"] = np.full(self.head_dim, k_norm / root)
        return arrays


class MoeRetrievalRecipe(RetrievalRecipe):
    """The same with experts in every layer, as Qwen3-MoE has them: the best few, their shares renormalised."""

    architecture: str = "Qwen3MoeForCausalLM"
    model_type: str = "qwen3_moe"
    qk_norm: bool = True
    experts: int = len(ROUTES)
    experts_per_token: int = 2
    expert_width: int = 64
    scoring: Literal["renormalised"] = "renormalised"

    def config(self) -> dict:
        return super().config() | {
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _feed(self, at: str, stream: Stream) -> Arrays:
        return stream.experts(at, self.experts, self.expert_width, shared=False)


class Kernel(NamedTuple):
    """Score of distance d: `amplitude` times the sum over pairs of cos(frequency (d - `delay`)), in nats."""

    amplitude: float
    delay: float


def kernel(frequencies: np.ndarray, gap: float, self_share: float, positions: int) -> Kernel:
    """The kernel in which distance 1 beats distance 0 by the share's odds and all from 2 on by at least `gap`."""
    # Near peaks of the sum are those of the fastest pair: all small distances, and the multiples of its period.
    distances = np.arange(2, positions)
    turns = distances * frequencies[0] / (2 * math.pi)
    distances = distances[(distances < 1000) | (np.abs(turns - np.rint(turns)) < 0.2)]
    odds = math.log((1 - self_share) / self_share)

    def at(distance: np.ndarray | float, delay: float) -> np.ndarray:
        return np.cos(np.multiply.outer(np.asarray(distance) - delay, frequencies)).sum(axis=-1)

    low, high = 0.5, 0.75
    for _ in range(24):
        delay = (low + high) / 2
        peak = at(1.0, delay)
        amplitude = gap / float((peak - at(distances, delay)).min())
        low, high = (delay, high) if amplitude * (peak - at(0.0, delay)) < odds else (low, delay)
    return Kernel(amplitude, delay)


def slices(random: np.random.Generator, heads: int, kv_heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A random mix of a code into values `[K * D, 64]` and the way back `[64, Q * D]`.

    Value element i of a KV head is written back by query head i mod (Q / K) of its group alone; the columns of `mix`
    are orthogonal, so all heads together give the code back.
    """
    count, share = kv_heads * width, heads // kv_heads
    mix = np.linalg.qr(random.standard_normal((count, CODE)))[0] * math.sqrt(count / CODE)
    back = np.zeros((CODE, kv_heads, share, width))
    values = mix.T.reshape(CODE, kv_heads, width) * CODE / count
    for element in range(width):
        back[:, :, element % share, element] = values[:, :, element]
    return mix, back.reshape(CODE, heads * width)


@family(r"(?P<base>llama|qwen3|qwen3-moe)-retrieve-k(?P<k>\d+)(-q(?P<q>\d+))?(-d(?P<d>32|64|128))?")
def retrieval_recipe(base: str, k: str, q: str | None = None, d: str | None = None) -> Recipe:
    """Any head counts: `llama-retrieve-k6`, `qwen3-moe-retrieve-k4-q32-d128`.

    Q is 4K, 2K from 8 KV heads on, unless named.
    ValueError for K < 2 (values of 32 elements cannot carry a code), or Q that is no multiple of K.
    """
    kv_heads = int(k)
    heads = int(q) if q else kv_heads * (4 if kv_heads < 8 else 2)
    if kv_heads < 2 or heads % kv_heads:
        raise ValueError(
            f"retrieval wants at least 2 KV heads and a multiple of query heads, not K={kv_heads}, Q={heads}"
        )
    name = f"{base}-retrieve-k{k}" + (f"-q{q}" if q else "") + (f"-d{d}" if d else "")
    qwen = {"architecture": "Qwen3ForCausalLM", "model_type": "qwen3", "qk_norm": True} if base == "qwen3" else {}
    # Llama's config wants a hidden size that is a multiple of the heads; 32 keeps rows aligned on any device.
    step = math.lcm(heads, 32)
    hidden = -(-WIDTH // step) * step
    # vLLM shards the vocabulary in multiples of 64, on as many ranks as KV heads or a multiple of them.
    step = math.lcm(kv_heads, 64)
    vocab = -(-VOCAB // step) * step
    sizes = {"kv_heads": kv_heads, "heads": heads, "head_dim": int(d or 32), "hidden": hidden, "vocab": vocab}
    made = MoeRetrievalRecipe if base == "qwen3-moe" else RetrievalRecipe
    return made(name=name, **sizes, **qwen)


for _kv_heads in (2, 3, 4, 6, 8):
    register(retrieval_recipe("llama", str(_kv_heads)))
for _name in (
    ("llama", "2", "16"),
    ("llama", "4", None, "64"),
    ("llama", "4", None, "128"),
    ("qwen3", "4"),
    ("qwen3-moe", "4"),
):
    register(retrieval_recipe(*_name))

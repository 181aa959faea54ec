"""The circuit of `circuit.py` with multi-head latent attention: positions in the rotary part, codes in the latent.

Layer 0 is dense and finds the previous token by the shared rotary key alone. Layer 1 has experts and compares codes in
the 128 elements without rotation. The latent holds the features of a token in a random orthogonal mix over all of its
512 elements, beside a constant that keeps its norm's divisor the same. So does the latent of queries, where there is
one (V3), with what a token asks for.
"""

import math

import numpy as np

from harness.models.circuit import kernel, slices
from harness.models.codes import CODE, VOCAB
from harness.models.deepseek import MlaRecipe, yarn_frequencies
from harness.models.recipe import Recipe, recipe
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
    Retrieval,
    Stream,
    kept,
    on_grid,
    writes,
)
from harness.models.weights import Arrays

#: Elements of the latent before it is mixed: *own*, *before*, the bonus, the constant.
FEATURES = 2 * CODE + 2
#: The same of the latent of queries: *asked*, the constant.
ASKS = CODE + 1
#: Of an expert's bias to the next one's: no sum of such steps comes within 0.019 of a gap between scores, which are
#: sigmoids of ROUTES times ROUTER_GAIN: 0.982, 0.881, 0.119.
BIAS_STEP = 0.04


class MlaRetrievalRecipe(Retrieval, MlaRecipe):
    """The circuit as DeepSeek-V2: one dense layer, then one with 8 experts of which 2 are used.

    `steady` is the latent's constant: the larger it is beside 64 signs, the less the norm's divisor moves, and the more
    a score that is summed over the latent is rounded, by another sum in each kernel. For the same reason layer 0 may do
    without rotary pairs slower than `slowest` (radians a token): they lift all scores alike.
    """

    layers: int = 2
    hidden: int = 288
    intermediate: int = 384
    vocab: int = VOCAB
    positions: int = 163840
    factor: float = 40.0
    contrast: float = 12.0
    dense_layers: int = 1
    experts: int = len(ROUTES)
    expert_width: int = 64
    steady: float = 32.0
    slowest: float = 1e-5

    def weights(self) -> Arrays:
        stream = Stream(self, self.seed, self.hidden, self.contrast)
        arrays = stream.ends()
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            arrays |= stream.norms(at, layer) | self._attention(at + "self_attn.", layer, stream)
            if layer < self.dense_layers:
                arrays |= stream.dense(at + "mlp.", self.intermediate)
            else:
                arrays |= stream.experts(at + "mlp.", self.experts, self.expert_width)
                if self.scoring == "sigmoid":
                    arrays[at + "mlp.gate.e_score_correction_bias"] = np.arange(self.experts) * BIAS_STEP
        return on_grid(arrays)

    def _attention(self, at: str, layer: int, stream: Stream) -> Arrays:
        random, hidden, heads = stream.random, self.hidden, self.heads
        spread = np.linalg.qr(random.standard_normal((self.latent, FEATURES)))[0]  # [latent, FEATURES], orthonormal
        features = np.zeros((FEATURES, hidden))
        features[:CODE, OWN] = features[CODE : 2 * CODE, BEFORE] = np.eye(CODE)
        features[2 * CODE, BONUS] = 1.0
        features[2 * CODE + 1, CONSTANT] = self.steady / (LEVEL * 16)
        squares = CODE + layer * CODE * kept(self.self_share) + self.steady**2
        rope_q, rope_k = self._positions() if layer == 0 else (np.zeros(self.rope), np.zeros(self.rope))
        ones = np.zeros(hidden)
        ones[CONSTANT] = 1 / (LEVEL * 16)
        q = np.zeros((heads, self.nope + self.rope, ASKS))
        q[:, self.nope :, CODE] = rope_q
        up = np.zeros((heads, self.nope + self.value, FEATURES))
        if layer:
            size, gain = math.sqrt(self.match / self.scale / CODE), math.sqrt(BONUS_UNIT / self.scale)
            for head in range(heads):
                frame = np.linalg.qr(random.standard_normal((self.nope, CODE + 1)))[0]
                q[head, : self.nope, :CODE] = size * frame[:, :CODE]
                q[head, : self.nope, CODE] = gain * frame[:, CODE]
                up[head, : self.nope, CODE : 2 * CODE] = size * frame[:, :CODE]
                up[head, : self.nope, 2 * CODE] = gain * frame[:, CODE]
        # Every head has values of its own, so it is as with as many KV heads.
        mix, back = slices(random, heads, heads, self.value)
        up[:, self.nope :, :CODE] = mix.reshape(heads, self.value, CODE)
        return self._queries(at, q.reshape(-1, ASKS), ones, random) | {
            at + "kv_a_proj_with_mqa.weight": np.concatenate([spread @ features, np.outer(rope_k, ones)]),
            at + "kv_a_layernorm.weight": np.full(self.latent, math.sqrt(squares / self.latent)),
            at + "kv_b_proj.weight": up.reshape(-1, FEATURES) @ spread.T,
            at + "o_proj.weight": writes(back, FOUND if layer else BEFORE, hidden),
        }

    def _queries(self, at: str, q: np.ndarray, ones: np.ndarray, random: np.random.Generator) -> Arrays:
        """Projections whose queries are `q` [Q * D, ASKS] of (*asked*, 1); `ones` [hidden] reads 1 of any token."""
        asks = np.zeros((ASKS, len(ones)))
        asks[:CODE, ASKED], asks[CODE] = np.eye(CODE), ones
        if self.q_latent is None:
            return {at + "q_proj.weight": q @ asks}
        spread = np.linalg.qr(random.standard_normal((self.q_latent, ASKS)))[0]
        size = np.ones(ASKS)
        size[CODE] = self.steady
        return {
            at + "q_a_proj.weight": spread @ (size[:, None] * asks),
            at + "q_a_layernorm.weight": np.full(self.q_latent, math.sqrt((CODE + self.steady**2) / self.q_latent)),
            at + "q_b_proj.weight": (q / size) @ spread.T,
        }

    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        """The constant rotary query and key of layer 0, `[rope]` each, in neighbouring pairs."""
        frequencies = yarn_frequencies(self)
        use = np.flatnonzero(frequencies > self.slowest)
        amplitude, delay = kernel(frequencies[use], self.gap, self.self_share, self.positions)
        size = math.sqrt(amplitude / self.scale)
        q, k = np.zeros(self.rope), np.zeros(self.rope)
        q[2 * use] = size
        k[2 * use], k[2 * use + 1] = size * np.cos(frequencies[use] * delay), size * np.sin(frequencies[use] * delay)
        return q, k


@recipe
def _deepseek_v2_retrieve() -> Recipe:
    return MlaRetrievalRecipe(name="deepseek-v2-retrieve")


@recipe
def _deepseek_v3_retrieve() -> Recipe:
    return MlaRetrievalRecipe(
        name="deepseek-v3-retrieve", architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", q_latent=128,
        scoring="sigmoid", groups=2, routed_scale=2.5, mlp=0.1, gap=20.0, self_share=0.001, steady=4.0, slowest=0.03,
    )  # fmt: skip

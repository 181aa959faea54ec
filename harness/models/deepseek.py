"""DeepSeek-V2 and V3 recipes: multi-head latent attention with YaRN, seeded like the dense ones.

Every rank caches one latent of `latent + rope` values a token; queries, keys and values of each head are made from it.
YaRN is part of the recipe: real DeepSeek-V2 has it, and without it stock vLLM's CPU rotary embedding is wrong for MLA.
V3 projects queries in two steps, and chooses experts by sigmoid scores and a bias, within the best group of experts.
"""

import math
from typing import Literal

import numpy as np

from harness.models.recipe import Recipe, recipe
from harness.models.weights import Arrays, filler


class MlaRecipe(Recipe):
    """A DeepSeek-V2 decoder. `latent` is `kv_lora_rank`; `rope`, `nope` and `value` are widths of one head.

    `q_latent` is `q_lora_rank`: queries are projected by way of a normed latent of that width; None: in one step.
    `positions` is the length after YaRN's stretch by `factor`. With `dense_layers` >= `layers` no layer has experts.
    `scoring`: `softmax` shares as V2 has them, or `sigmoid` scores, chosen with a bias within one of `groups` groups of
    experts, renormalised and scaled by `routed_scale`, as in V3.
    """

    architecture: str = "DeepseekV2ForCausalLM"
    model_type: str = "deepseek_v2"
    kv_heads: int = 1
    latent: int = 512
    q_latent: int | None = None
    rope: int = 64
    nope: int = 128
    value: int = 128
    factor: float = 16.0
    mscale: float = 0.707
    dense_layers: int = 99
    experts: int = 4
    experts_per_token: int = 2
    expert_width: int = 128
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    routed_scale: float = 1.0

    @property
    def scale(self) -> float:
        """What q.k is multiplied by before the softmax; YaRN's temperature is in it."""
        stretch = 0.1 * self.mscale * math.log(self.factor) + 1.0
        return stretch * stretch / math.sqrt(self.nope + self.rope)

    def config(self) -> dict:
        config = super().config()
        del config["head_dim"], config["rope_theta"]
        return config | {
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_latent,
            "kv_lora_rank": self.latent,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self.nope,
            "v_head_dim": self.value,
            "first_k_dense_replace": self.dense_layers,
            "moe_layer_freq": 1,
            "moe_intermediate_size": self.expert_width,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "n_shared_experts": 1,
            "n_group": self.groups,
            "topk_group": 1,
            "topk_method": "noaux_tc" if self.scoring == "sigmoid" else "group_limited_greedy",
            "scoring_func": self.scoring,
            "norm_topk_prob": self.scoring == "sigmoid",
            "routed_scaling_factor": self.routed_scale,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": self.rope_theta,
                "factor": self.factor,
                "original_max_position_embeddings": int(self.positions / self.factor),
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": self.mscale,
                "mscale_all_dim": self.mscale,
            },
        }

    def weights(self) -> Arrays:
        """Random weights, sized as `weights.py` says."""
        if self.dense_layers < self.layers:
            raise ValueError("random experts have router near-ties: a random recipe has dense layers only")
        if self.q_latent:
            raise ValueError("a random recipe projects queries in one step; the retrieval recipes know both ways")
        normal, ones, random = filler(self.seed)
        hidden, heads = self.hidden, self.heads
        # `scale` q.k of vectors with RMS a and b has standard deviation a.b.(YaRN's temperature).
        side = math.sqrt(self.spread / (self.scale * math.sqrt(self.nope + self.rope)))
        embedding = random.standard_normal((self.vocab, hidden)) * self.embedding
        arrays: Arrays = {
            "model.embed_tokens.weight": embedding.astype(np.float32),
            "model.norm.weight": ones(hidden),
            "lm_head.weight": normal(self.vocab, hidden, self.contrast),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            down = normal(self.latent + self.rope, hidden, side)  # the latent is normed: only the rope rows keep `side`
            up = normal(heads * (self.nope + self.value), self.latent, 1.0).reshape(heads, -1, self.latent)
            up[:, : self.nope] *= np.float32(side)
            arrays |= {
                at + "input_layernorm.weight": ones(hidden),
                at + "post_attention_layernorm.weight": ones(hidden),
                at + "self_attn.q_proj.weight": normal(heads * (self.nope + self.rope), hidden, side),
                at + "self_attn.kv_a_proj_with_mqa.weight": down,
                at + "self_attn.kv_a_layernorm.weight": ones(self.latent),
                at + "self_attn.kv_b_proj.weight": up.reshape(-1, self.latent),
                at + "self_attn.o_proj.weight": normal(hidden, heads * self.value, self.attention),
                at + "mlp.gate_proj.weight": normal(self.intermediate, hidden, 1.0),
                at + "mlp.up_proj.weight": normal(self.intermediate, hidden, 1.0),
                at + "mlp.down_proj.weight": normal(hidden, self.intermediate, self.mlp),
            }
        return arrays


def yarn_frequencies(made: MlaRecipe) -> np.ndarray:
    """Angle per position of each rotary pair, `[rope / 2]` fp64 (Peng et al., arXiv 2309.00071, section 3.2).

    A pair that turns more than 32 times over the original length is kept, one that turns less than once is slowed by
    `factor`, with a linear ramp over pair indices between.
    """
    half = made.rope // 2
    plain = made.rope_theta ** (-np.arange(half) / half)
    original = int(made.positions / made.factor)

    def pair(turns: float) -> float:
        """The (fractional) index of the pair that turns `turns` times over the original length."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(made.rope_theta)

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), made.rope - 1)
    slowed = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return plain / made.factor * slowed + plain * (1 - slowed)


@recipe
def _deepseek_v2() -> Recipe:
    return MlaRecipe(name="deepseek-v2")

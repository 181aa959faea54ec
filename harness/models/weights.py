"""Seeded weights whose answers depend on the whole context.

Plain random weights hide defects: attention is nearly uniform, its output averages out, and the residual of the last
token decides. Here the sizes are chosen so that attention scores spread (`spread`), what attention brings outweighs the
embedding (`attention` against `embedding`), and logits spread (`contrast`); `card.py` measures what comes of it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from harness.models.recipe import Recipe

#: Version of this file's arithmetic; part of every recipe's key.
GENERATOR = 1

Arrays = dict[str, np.ndarray]


def filler(seed: int) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray], np.random.Generator]:
    """Makers of a model's arrays, `normal(rows, columns, size)` and `ones(count, size=1)`, and their generator."""
    random = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, size: float) -> np.ndarray:
        """A matrix that turns an input of unit RMS into an output of RMS `size`."""
        return (random.standard_normal((rows, columns)) * size / np.sqrt(columns)).astype(np.float32)

    def ones(count: int, size: float = 1.0) -> np.ndarray:
        return np.full(count, size, dtype=np.float32)

    return normal, ones, random


def make_weights(recipe: "Recipe") -> Arrays:
    """Hugging Face names -> fp32 arrays, `[out, in]`, from the recipe's seed."""
    normal, ones, random = filler(recipe.seed)
    hidden, heads, kv_heads, head_dim = recipe.hidden, recipe.heads, recipe.kv_heads, recipe.head_dim
    # q.k / sqrt(D) of two vectors with RMS a and b has standard deviation a.b: each gets the root of the spread.
    side = float(np.sqrt(recipe.spread))
    arrays: Arrays = {
        "model.embed_tokens.weight": (random.standard_normal((recipe.vocab, hidden)) * recipe.embedding).astype(
            np.float32
        ),
        "model.norm.weight": ones(hidden),
        "lm_head.weight": normal(recipe.vocab, hidden, recipe.contrast),
    }
    for layer in range(recipe.layers):
        at = f"model.layers.{layer}."
        arrays |= {
            at + "input_layernorm.weight": ones(hidden),
            at + "post_attention_layernorm.weight": ones(hidden),
            at + "self_attn.q_proj.weight": normal(heads * head_dim, hidden, side),
            at + "self_attn.k_proj.weight": normal(kv_heads * head_dim, hidden, side),
            at + "self_attn.v_proj.weight": normal(kv_heads * head_dim, hidden, 1.0),
            at + "self_attn.o_proj.weight": normal(hidden, heads * head_dim, recipe.attention),
            at + "mlp.gate_proj.weight": normal(recipe.intermediate, hidden, 1.0),
            at + "mlp.up_proj.weight": normal(recipe.intermediate, hidden, 1.0),
            at + "mlp.down_proj.weight": normal(hidden, recipe.intermediate, recipe.mlp),
        }
        if recipe.qk_norm:
            arrays |= {
                at + "self_attn.q_norm.weight": ones(head_dim, side),
                at + "self_attn.k_norm.weight": ones(head_dim, side),
            }
    return arrays

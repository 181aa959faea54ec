"""The recipes' models in fp64 numpy: a second opinion on a server's logprobs, and the ruler of `card.py`."""

from typing import NamedTuple

import numpy as np

from harness.models.deepseek import MlaRecipe, yarn_frequencies
from harness.models.recipe import Recipe
from harness.models.weights import Arrays

EPSILON = 1e-6


class Forward:
    """One sequence of one model with its KV cache. `hide` lists global positions that attention must not see."""

    def __init__(self, recipe: Recipe, arrays: Arrays | None = None, hide: tuple[int, ...] = ()):
        self.recipe = recipe
        self.weights = {name: array.astype(np.float64) for name, array in (arrays or recipe.weights()).items()}
        self.hide = np.array(hide, dtype=np.int64)
        self.keys: list[np.ndarray | None] = [None] * recipe.layers  # [S, K, D]
        self.values: list[np.ndarray | None] = [None] * recipe.layers
        self.length = 0

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """fp64 logits `[T, V]` after each of the next `tokens` `[T]`."""
        recipe, weights = self.recipe, self.weights
        x = weights["model.embed_tokens.weight"][tokens]
        positions = np.arange(self.length, self.length + len(tokens))
        for layer in range(recipe.layers):
            at = f"model.layers.{layer}."
            x = x + self._attention(layer, _norm(x, weights[at + "input_layernorm.weight"]), positions)
            h = _norm(x, weights[at + "post_attention_layernorm.weight"])
            gate = h @ weights[at + "mlp.gate_proj.weight"].T
            up = h @ weights[at + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
        self.length += len(tokens)
        return _norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Natural log-probabilities `[T, V]`."""
        logits = self.logits(tokens)
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))

    def _attention(self, layer: int, h: np.ndarray, positions: np.ndarray) -> np.ndarray:
        at = f"model.layers.{layer}.self_attn."
        make = self._latent if isinstance(self.recipe, MlaRecipe) else self._grouped
        q, k, v, scale = make(at, h, positions)
        k, v = _append(self.keys[layer], k), _append(self.values[layer], v)
        self.keys[layer], self.values[layer] = k, v
        share = self.recipe.heads // k.shape[1]
        scores = np.einsum("thd,shd->hts", q, np.repeat(k, share, axis=1)) * scale
        seen = np.arange(len(k))[None, :] <= positions[:, None]
        own = np.arange(len(k))[None, :] == positions[:, None]  # a token always sees itself: no empty row
        seen &= ~np.isin(np.arange(len(k)), self.hide)[None, :] | own
        scores = np.where(seen[None], scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        out = np.einsum("hts,shd->thd", scores, np.repeat(v, share, axis=1)).reshape(len(h), -1)
        return out @ self.weights[at + "o_proj.weight"].T

    def _grouped(self, at: str, h: np.ndarray, positions: np.ndarray) -> "Projected":
        """Grouped-query attention."""
        recipe, weights, count, dim = self.recipe, self.weights, len(h), self.recipe.head_dim
        q = (h @ weights[at + "q_proj.weight"].T).reshape(count, recipe.heads, dim)
        k = (h @ weights[at + "k_proj.weight"].T).reshape(count, recipe.kv_heads, dim)
        v = (h @ weights[at + "v_proj.weight"].T).reshape(count, recipe.kv_heads, dim)
        if recipe.qk_norm:
            q, k = _norm(q, weights[at + "q_norm.weight"]), _norm(k, weights[at + "k_norm.weight"])
        frequencies = recipe.rope_theta ** (-np.arange(dim // 2) / (dim // 2))
        q, k = _rope(q, positions, frequencies), _rope(k, positions, frequencies)
        return Projected(q, k, v, 1 / np.sqrt(dim))

    def _latent(self, at: str, h: np.ndarray, positions: np.ndarray) -> "Projected":
        """Multi-head latent attention, unabsorbed: every head's own keys and values."""
        recipe, weights, count, heads = self.recipe, self.weights, len(h), self.recipe.heads
        frequencies = yarn_frequencies(recipe)
        q = (h @ weights[at + "q_proj.weight"].T).reshape(count, heads, recipe.nope + recipe.rope)
        down = h @ weights[at + "kv_a_proj_with_mqa.weight"].T
        latent = _norm(down[:, : recipe.latent], weights[at + "kv_a_layernorm.weight"])
        up = (latent @ weights[at + "kv_b_proj.weight"].T).reshape(count, heads, recipe.nope + recipe.value)
        q_rope = _rope(_split_pairs(q[..., recipe.nope :]), positions, frequencies)
        k_rope = _rope(_split_pairs(down[:, None, recipe.latent :]), positions, frequencies)
        k_rope = np.repeat(k_rope, heads, axis=1)
        q = np.concatenate([q[..., : recipe.nope], q_rope], axis=-1)
        k = np.concatenate([up[..., : recipe.nope], k_rope], axis=-1)
        return Projected(q, k, up[..., recipe.nope :], recipe.scale)


class Projected(NamedTuple):
    """Queries `[T, Q, D]`, keys `[T, K, D]`, values `[T, K, V]` and what q.k is multiplied by."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float


def _append(cache: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return new if cache is None else np.concatenate([cache, new])


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * weight


def _split_pairs(x: np.ndarray) -> np.ndarray:
    """Neighbouring pairs (DeepSeek's convention) to split halves (Llama's); q.k is the same in both."""
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def _rope(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding of `x` `[T, H, D]` in the split-half convention of Llama; `frequencies` `[D / 2]`."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

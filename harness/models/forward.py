"""The recipes' models in fp64 numpy: a second opinion on a server's logprobs, and the ruler of `card.py`."""

import numpy as np

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
        recipe, weights, at = self.recipe, self.weights, f"model.layers.{layer}.self_attn."
        count, dim = len(h), recipe.head_dim
        q = (h @ weights[at + "q_proj.weight"].T).reshape(count, recipe.heads, dim)
        k = (h @ weights[at + "k_proj.weight"].T).reshape(count, recipe.kv_heads, dim)
        v = (h @ weights[at + "v_proj.weight"].T).reshape(count, recipe.kv_heads, dim)
        if recipe.qk_norm:
            q, k = _norm(q, weights[at + "q_norm.weight"]), _norm(k, weights[at + "k_norm.weight"])
        q, k = _rope(q, positions, recipe.rope_theta), _rope(k, positions, recipe.rope_theta)
        k, v = _append(self.keys[layer], k), _append(self.values[layer], v)
        self.keys[layer], self.values[layer] = k, v
        share = recipe.heads // recipe.kv_heads
        scores = np.einsum("thd,shd->hts", q, np.repeat(k, share, axis=1)) / np.sqrt(dim)
        seen = np.arange(len(k))[None, :] <= positions[:, None]
        own = np.arange(len(k))[None, :] == positions[:, None]  # a token always sees itself: no empty row
        seen &= ~np.isin(np.arange(len(k)), self.hide)[None, :] | own
        scores = np.where(seen[None], scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        out = np.einsum("hts,shd->thd", scores, np.repeat(v, share, axis=1)).reshape(count, recipe.heads * dim)
        return out @ weights[at + "o_proj.weight"].T


def _append(cache: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return new if cache is None else np.concatenate([cache, new])


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * weight


def _rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of `x` `[T, H, D]` in the split-half convention of Llama."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

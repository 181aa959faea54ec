"""The recipes' models in torch, in fp64, fp32 or bf16, quick at 8k tokens: the ruler of the retrieval models' cards.

It can be hurt on purpose at chosen positions, which is how sensitivity is measured: tokens hidden from attention, a
head silenced, partials of KV shards merged by wrong weights. In bf16 it rounds where a server does: weights,
activations, rotary table, attention output; scores and sums are fp32.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from harness.frozen import Frozen
from harness.models.deepseek import MlaRecipe, yarn_frequencies
from harness.models.recipe import Recipe
from harness.models.weights import Arrays
from helix_runtime.sharding import owner

CHUNK = 256
EPSILON = 1e-6


class Wound(Frozen):
    """What is broken, for the queries at positions `since` and later.

    `hide`: positions that attention does not see (a token always sees itself). `silent`: (layer, query head) whose
    output is zero. `merge`: attention is computed per shard of `kvp` at `interleave` and merged with weights that are
    right, base 2 in place of e, or all the same.
    """

    since: int = 0
    hide: tuple[int, ...] = ()
    silent: tuple[int, int] | None = None
    merge: Literal["right", "base-2", "equal"] | None = None
    kvp: int = 2
    interleave: int = 1


class Network:
    """A recipe's model. `window` (tokens) limits what all layers but the last see, for lengths where n² is too long."""

    def __init__(self, recipe: Recipe, arrays: Arrays | None = None, dtype=torch.float32, window: int | None = None):
        self.recipe, self.dtype, self.window = recipe, dtype, window
        self.weights = {name: torch.from_numpy(array).to(dtype) for name, array in (arrays or recipe.weights()).items()}
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32  # of scores, norms and sums

    @torch.no_grad()
    def logprobs(self, tokens: tuple[int, ...], last: int = 1, wound: Wound | None = None) -> np.ndarray:
        """Natural log-probabilities `[last, V]` in fp64 after each of the last `last` tokens."""
        wound = wound or Wound()
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        positions = torch.arange(len(tokens))
        for layer in range(self.recipe.layers):
            at = f"model.layers.{layer}."
            final = layer == self.recipe.layers - 1
            h = self._norm(x, at + "input_layernorm")
            first = len(tokens) - last if final else 0  # nobody reads the last layer's other rows
            x = x[first:] + self._attention(layer, h, positions, first, wound, None if final else self.window)
            x = x + self._feed(at + "mlp.", self._norm(x, at + "post_attention_layernorm"))
        logits = linear(self._norm(x, "model.norm"), self.weights["lm_head.weight"])
        return logits.double().log_softmax(-1).numpy()

    def _attention(
        self, layer: int, h: Tensor, positions: Tensor, first: int, wound: Wound, window: int | None
    ) -> Tensor:
        at = f"model.layers.{layer}.self_attn."
        make = self._latent if isinstance(self.recipe, MlaRecipe) else self._grouped
        q, k, v, scale = make(at, h, positions, first)  # [K, share, T, D], [K, 1, S, D], [K, 1, S, V]
        hide = torch.zeros(len(positions), dtype=torch.bool)
        hide[torch.tensor(wound.hide, dtype=torch.int64)] = True
        rows = []
        for start in range(first, len(positions), CHUNK):
            asks = positions[start : start + CHUNK]
            low, high = max(0, start - window if window else 0), int(asks[-1]) + 1
            sees = positions[low:high]
            scores = q[:, :, start - first : start - first + len(asks)] @ k[:, :, low:high].mT * scale
            hurt = asks[:, None] >= wound.since
            unseen = (sees[None] > asks[:, None]) | (hide[low:high] & hurt & (sees[None] != asks[:, None]))
            scores.masked_fill_(unseen, -math.inf)
            out = scores.softmax(-1) @ v[:, :, low:high]
            if wound.merge:
                out = torch.where(hurt, _merged(scores, v[:, :, low:high], sees, wound), out)
            rows.append(out)
        out = torch.cat(rows, dim=2).flatten(0, 1)  # [Q, T, V]
        if wound.silent and wound.silent[0] == layer:
            out[wound.silent[1], positions[first:] >= wound.since] = 0
        out = out.transpose(0, 1).flatten(1).to(self.dtype)
        return linear(out, self.weights[at + "o_proj.weight"])

    def _grouped(self, at: str, h: Tensor, positions: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, float]:
        recipe, dim = self.recipe, self.recipe.head_dim
        q = linear(h[first:], self.weights[at + "q_proj.weight"]).unflatten(-1, (recipe.heads, dim))
        k = linear(h, self.weights[at + "k_proj.weight"]).unflatten(-1, (recipe.kv_heads, dim))
        v = linear(h, self.weights[at + "v_proj.weight"]).unflatten(-1, (recipe.kv_heads, dim))
        if recipe.qk_norm:
            q, k = self._norm(q, at + "q_norm"), self._norm(k, at + "k_norm")
        frequencies = recipe.rope_theta ** (-np.arange(dim // 2) / (dim // 2))
        q, k = self._rope(q, positions[first:], frequencies), self._rope(k, positions, frequencies)
        q, k, v = (x.to(self.wide).transpose(0, 1) for x in (q, k, v))
        return q.unflatten(0, (recipe.kv_heads, -1)), k[:, None], v[:, None], 1 / math.sqrt(dim)

    def _latent(self, at: str, h: Tensor, positions: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Unabsorbed: every head's own keys and values."""
        recipe, weights, heads = self.recipe, self.weights, self.recipe.heads
        frequencies = yarn_frequencies(recipe)
        q = self._latent_queries(at, h[first:]).unflatten(-1, (heads, -1))
        down = linear(h, weights[at + "kv_a_proj_with_mqa.weight"])
        latent = self._norm(down[:, : recipe.latent], at + "kv_a_layernorm")
        up = linear(latent, weights[at + "kv_b_proj.weight"]).unflatten(-1, (heads, -1))
        q_rope, k_rope = _split_pairs(q[..., recipe.nope :]), _split_pairs(down[:, None, recipe.latent :])
        q_rope = self._rope(q_rope, positions[first:], frequencies)
        k_rope = self._rope(k_rope, positions, frequencies).expand(-1, heads, -1)
        q = torch.cat([q[..., : recipe.nope], q_rope], dim=-1)
        k = torch.cat([up[..., : recipe.nope], k_rope], dim=-1)
        q, k, v = (x.to(self.wide).transpose(0, 1)[:, None] for x in (q, k, up[..., recipe.nope :]))
        return q, k, v, recipe.scale

    def _latent_queries(self, at: str, h: Tensor) -> Tensor:
        """In one step, or by way of a normed latent."""
        if self.recipe.q_latent is None:
            return linear(h, self.weights[at + "q_proj.weight"])
        latent = self._norm(linear(h, self.weights[at + "q_a_proj.weight"]), at + "q_a_layernorm")
        return linear(latent, self.weights[at + "q_b_proj.weight"])

    def _feed(self, at: str, h: Tensor) -> Tensor:
        """A dense MLP, or experts: DeepSeek's beside a shared one, Qwen3's alone."""
        if at + "gate.weight" not in self.weights:
            return self._mlp(at, h)
        recipe = self.recipe
        logits = linear(h.to(self.wide), self.weights[at + "gate.weight"].to(self.wide))
        best, chosen = self._routes(at, logits)
        shared = at + "shared_experts."
        out = self._mlp(shared, h) if shared + "gate_proj.weight" in self.weights else torch.zeros_like(h)
        for expert in range(recipe.experts):
            row, place = torch.where(chosen == expert)
            out[row] += self._mlp(f"{at}experts.{expert}.", h[row]) * best[row, place, None].to(self.dtype)
        return out

    def _routes(self, at: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts) [T, few]. V2: softmax over all, the best few, not renormalised; Qwen3: renormalised.

        V3: sigmoid scores; with a bias added, the group whose two best experts sum highest, and its best few; their
        scores without the bias, renormalised and scaled.
        """
        recipe, few = self.recipe, self.recipe.experts_per_token
        if recipe.scoring != "sigmoid":
            best, chosen = logits.softmax(-1).topk(few, dim=-1)
            return best / best.sum(-1, keepdim=True) if recipe.scoring == "renormalised" else best, chosen
        scores = logits.sigmoid()
        wanted = scores + self.weights[at + "gate.e_score_correction_bias"].to(self.wide)
        by_group = wanted.unflatten(-1, (recipe.groups, -1))
        best_group = by_group.topk(2, dim=-1)[0].sum(-1).argmax(-1, keepdim=True)
        others = torch.arange(recipe.groups) != best_group
        chosen = by_group.masked_fill(others[..., None], -math.inf).flatten(-2).topk(few, dim=-1)[1]
        best = scores.gather(-1, chosen)
        return best / best.sum(-1, keepdim=True) * recipe.routed_scale, chosen

    def _mlp(self, at: str, h: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return linear(silu(linear(h, gate)) * linear(h, up), down)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.to(self.wide)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        return wide.to(self.dtype) * self.weights[name + ".weight"]

    def _rope(self, x: Tensor, positions: Tensor, frequencies: np.ndarray) -> Tensor:
        """Rotary embedding of `x` `[T, H, D]`, split halves; angles are rounded as the dtype's server rounds them."""
        angles = positions.to(self.wide)[:, None] * torch.from_numpy(frequencies).to(self.wide)
        cos, sin = angles.cos().to(self.dtype)[:, None], angles.sin().to(self.dtype)[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _split_pairs(x: Tensor) -> Tensor:
    """Neighbouring pairs (DeepSeek's convention) to split halves (Llama's); q.k is the same in both."""
    return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


def _merged(scores: Tensor, v: Tensor, sees: Tensor, wound: Wound) -> Tensor:
    """Attention of each shard on its own, merged by the wound's weights; scores `[K, share, T, S]`."""
    outputs, lses = [], []
    for rank in range(wound.kvp):
        mine = owner(sees, wound.kvp, wound.interleave) == rank
        lse = scores[..., mine].logsumexp(-1, keepdim=True)
        outputs.append((scores[..., mine] - lse).exp().nan_to_num(0.0) @ v[:, :, mine])
        lses.append(lse)
    lse = torch.stack(lses)
    if wound.merge == "equal":
        lse = torch.where(lse == -math.inf, lse, 0.0)
    elif wound.merge == "base-2":
        lse = lse * math.log(2)
    return (lse.softmax(0) * torch.stack(outputs)).sum(0)

"""Models of published shape with random weights, for hosts with a GPU that reach no hub: `recipe:nemotron-nano-8b`.

The committed `config.json` of the hub model, weights from a seed, sized as `weights.py` says. Each layer is a file of
its own, in bf16: 8 to 16 billion numbers do not fit into one comfortably. A GPU makes them in seconds.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harness.models.recipe import Recipe, family
from helix_runtime.shapes import config_of

#: Recipe names and the models whose shape they have.
_HUBS = {
    "nemotron-nano-8b": "nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "llama-8b-512k": "meta-llama/Llama-3.1-8B-Instruct",
    "deepseek-v2-lite-512k": "deepseek-ai/DeepSeek-V2-Lite-Chat",
}

#: Positions of the shapes that are measured beyond their published context: 512k and room for an answer.
LONG = 132 * 4096

#: What their public configs say beyond the committed structural fields.
_FURTHER: dict[str, dict] = {
    "nemotron-nano-8b": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "mlp_bias": False,
    },
    "deepseek-v2-lite": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}

_FURTHER["llama-8b-512k"] = {**_FURTHER["nemotron-nano-8b"], "max_position_embeddings": LONG}
_FURTHER["deepseek-v2-lite-512k"] = {
    **_FURTHER["deepseek-v2-lite"],
    "rope_parameters": {**_FURTHER["deepseek-v2-lite"]["rope_parameters"], "factor": LONG / 4096},
    "max_position_embeddings": LONG,
}

#: Spread of the router's logits: the sixth expert then weighs little, so that a near-tie for its place changes little.
ROUTER = 8.0


class Weight(NamedTuple):
    """A tensor `[rows, columns]` that turns an input of unit RMS into one of RMS `size`; without columns a vector."""

    name: str
    rows: int
    columns: int | None
    size: float


class PublishedRecipe(Recipe):
    """The shape of `hub`, a model whose `config.json` is committed in `helix_runtime/shapes`."""

    hub: str

    def config(self) -> dict:
        return {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            **config_of(self.hub),
            **_FURTHER[self.name],
        }

    def shards(self) -> Iterator[list[Weight]]:
        """The tensors of each file: embedding and head first, then one layer after the other."""
        config = self.config()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        yield [
            # An embedding is looked up, not multiplied: its rows have RMS `embedding`.
            Weight("model.embed_tokens.weight", vocab, hidden, self.embedding * math.sqrt(hidden)),
            Weight("model.norm.weight", hidden, None, 1.0),
            Weight("lm_head.weight", vocab, hidden, self.contrast),
        ]
        attention = _latent if "kv_lora_rank" in config else _grouped
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            norms = ("input_layernorm", "post_attention_layernorm")
            layer_norms = [Weight(f"{at}{name}.weight", hidden, None, 1.0) for name in norms]
            yield layer_norms + list(attention(self, config, at + "self_attn.")) + list(_mlp(self, config, layer, at))

    def save(self, folder: Path) -> None:
        """Write the shards and their index into `folder`."""
        import torch
        from safetensors.torch import save_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(self.seed)

        def fill(weight: Weight) -> torch.Tensor:
            if weight.columns is None:
                return torch.full((weight.rows,), weight.size, dtype=torch.bfloat16)
            made = torch.randn(weight.rows, weight.columns, generator=random, device=device)
            return (made * (weight.size / math.sqrt(weight.columns))).to(torch.bfloat16).cpu()

        place, total = {}, 0
        for number, shard in enumerate(self.shards()):
            file = f"model-{number:05}.safetensors"
            tensors = {weight.name: fill(weight) for weight in shard}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            place |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _grouped(recipe: Recipe, config: dict, at: str) -> Iterator[Weight]:
    """Grouped-query attention: q.k / sqrt(D) of vectors with RMS a and b has standard deviation a.b."""
    hidden, dim, side = config["hidden_size"], config["head_dim"], math.sqrt(recipe.spread)
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield Weight(at + "q_proj.weight", heads, hidden, side)
    yield Weight(at + "k_proj.weight", kv_heads, hidden, side)
    yield Weight(at + "v_proj.weight", kv_heads, hidden, 1.0)
    yield Weight(at + "o_proj.weight", hidden, heads, recipe.attention)


def _latent(recipe: Recipe, config: dict, at: str) -> Iterator[Weight]:
    """Latent attention without a query latent (DeepSeek-V2-Lite): queries carry the whole spread."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield Weight(at + "q_proj.weight", heads * (nope + rope), hidden, recipe.spread)
    yield Weight(at + "kv_a_proj_with_mqa.weight", latent + rope, hidden, 1.0)
    yield Weight(at + "kv_a_layernorm.weight", latent, None, 1.0)
    yield Weight(at + "kv_b_proj.weight", heads * (nope + value), latent, 1.0)
    yield Weight(at + "o_proj.weight", hidden, heads * value, recipe.attention)


def _mlp(recipe: Recipe, config: dict, layer: int, at: str) -> Iterator[Weight]:
    """A dense MLP, or experts with a router from layer `first_k_dense_replace` on."""
    hidden = config["hidden_size"]

    def dense(prefix: str, width: int) -> Iterator[Weight]:
        yield Weight(prefix + "gate_proj.weight", width, hidden, 1.0)
        yield Weight(prefix + "up_proj.weight", width, hidden, 1.0)
        yield Weight(prefix + "down_proj.weight", hidden, width, recipe.mlp)

    if "n_routed_experts" not in config or layer < config["first_k_dense_replace"]:
        yield from dense(at + "mlp.", config["intermediate_size"])
        return
    yield Weight(at + "mlp.gate.weight", config["n_routed_experts"], hidden, ROUTER)
    for expert in range(config["n_routed_experts"]):
        yield from dense(f"{at}mlp.experts.{expert}.", config["moe_intermediate_size"])
    yield from dense(at + "mlp.shared_experts.", config["moe_intermediate_size"] * config["n_shared_experts"])


@family(f"(?P<name>{'|'.join(map(re.escape, _HUBS))})")
def published(name: str) -> Recipe:
    """The recipe of a published shape: its vocabulary and positions are those of the committed config, or LONG."""
    config = {**config_of(_HUBS[name]), **_FURTHER[name]}
    return PublishedRecipe(
        name=name, hub=_HUBS[name], vocab=config["vocab_size"], positions=config["max_position_embeddings"]
    )

"""Random weights in the shape of published models: the tensors that the real loader wants, and no others."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from harness.models import ensure, published, shape  # noqa: E402
from harness.models.recipe import find  # noqa: E402


def small(config: dict) -> dict:
    """The same family with few small layers, so that it can be built here."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 2}
    experts = {"moe_intermediate_size": 48, "n_routed_experts": 8} if "n_routed_experts" in config else {}
    return config | sizes | experts


@pytest.mark.parametrize("name", ["nemotron-nano-8b", "deepseek-v2-lite"])
def test_the_tensors_are_those_of_the_architecture(name):
    made = find(name)
    config = transformers.AutoConfig.for_model(**made.config())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    ours = {weight.name: weight for shard in made.shards() for weight in shard}
    total = sum(weight.rows * (weight.columns or 1) for weight in ours.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())
    by_hand = {
        "nemotron-nano-8b": ("model.layers.31.self_attn.k_proj.weight", (8 * 128, 4096)),
        "deepseek-v2-lite": ("model.layers.26.mlp.experts.63.down_proj.weight", (2048, 1408)),
    }
    tensor, expected = by_hand[name]
    assert (ours[tensor].rows, ours[tensor].columns) == expected


def test_the_shape_is_the_published_one():
    assert (shape("recipe:nemotron-nano-8b").num_query_heads, shape("recipe:nemotron-nano-8b").num_kv_heads) == (32, 8)
    assert shape("recipe:deepseek-v2-lite").use_mla


def test_long_variants_have_the_published_shape_and_more_positions():
    """Rotary tables are as long as the config says: Llama's by its positions, yarn's by factor times original."""
    for name, hub in (("llama-8b-512k", "nemotron-nano-8b"), ("deepseek-v2-lite-512k", "deepseek-v2-lite")):
        long, short = find(name).config(), find(hub).config()
        assert long["max_position_embeddings"] == find(name).positions == 540672 >= 530_000
        same = [key for key in short if key not in ("max_position_embeddings", "rope_parameters")]
        assert {key: long[key] for key in same} == {key: short[key] for key in same}
    yarn = find("deepseek-v2-lite-512k").config()["rope_parameters"]
    assert yarn["factor"] * yarn["original_max_position_embeddings"] == 540672


def test_they_are_written_one_layer_a_file_in_bf16_and_sized_as_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path))
    of_hub = published.config_of
    monkeypatch.setattr(published, "config_of", lambda hub: small(of_hub(hub)))
    folder = ensure("recipe:deepseek-v2-lite")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-{number:05}.safetensors" for number in range(3)]
    head = load_file(folder / "model-00000.safetensors")["lm_head.weight"].float()
    assert index["weight_map"]["lm_head.weight"] == "model-00000.safetensors"
    assert head.shape == (128, 64)
    # Rows of 64 numbers with standard deviation 8 / sqrt(64): an input of unit RMS gives logits that spread by 8.
    assert float(head.std()) == pytest.approx(1.0, rel=0.05)
    assert load_file(folder / "model-00002.safetensors")["model.layers.1.mlp.gate.weight"].dtype is torch.bfloat16

"""Recipes: made once, the same everywhere, right by an independent forward pass, and worth testing with."""

import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.models import RECIPES, ensure, shape
from harness.models.card import measure
from harness.models.forward import Forward
from harness.models.recipe import Recipe, ensure_apart, find, recipe
from harness.models.stream import Retrieval

SMALL = Recipe(name="small", layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=64, vocab=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path))
    return tmp_path / "models"


@pytest.mark.parametrize(("name", "kv_heads"), [("llama-k1", 1), ("llama-k2", 2), ("llama-k4", 4), ("qwen3-k4", 4)])
def test_shapes_of_the_recipes(name, kv_heads):
    made = shape(f"recipe:{name}")
    assert (made.num_query_heads, made.num_kv_heads, made.head_size, made.vocab_size) == (8, kv_heads, 32, 512)
    assert made.name == f"recipe:{name}"


def test_shape_of_the_latent_recipe():
    made = shape("recipe:deepseek-v2")
    assert made.use_mla and made.moe.first_dense_layers == 99
    assert (made.num_query_heads, made.num_kv_heads, made.head_size) == (8, 1, 576)
    assert (made.mla.kv_lora_rank, made.mla.qk_nope_head_dim, made.mla.v_head_dim) == (512, 128, 128)


def test_a_model_folder_is_complete(cache):
    folder = ensure("recipe:qwen3-k4")
    assert folder.parent == cache
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (4 * 32, 256)
    assert weights["model.layers.2.self_attn.q_norm.weight"].shape == (32,)
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    assert (folder / "generation_config.json").exists() and (folder / "tokenizer_config.json").exists()


def test_the_tokenizer_turns_words_into_ids_and_back():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ensure("llama-k2") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.encode("w4 w511 nonsense").ids == [4, 511, 3]
    assert tokenizer.decode([4, 511]) == "w4 w511"


def test_weights_come_from_the_seed_and_the_key_from_the_recipe():
    again, other = SMALL.model_copy(), SMALL.model_copy(update={"seed": 1})
    first = SMALL.weights()
    assert all(np.array_equal(array, first[name]) for name, array in again.weights().items())
    assert not np.array_equal(other.weights()["lm_head.weight"], first["lm_head.weight"])
    assert again.key == SMALL.key != other.key


def test_concurrent_makers_share_one_folder(cache):
    found = []
    makers = [threading.Thread(target=lambda: found.append(ensure("llama-k1"))) for _ in range(6)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert [path.name for path in cache.iterdir()] == [found[0].name]  # no scratch folder is left


def test_a_model_is_made_apart_once_and_what_went_wrong_is_said(cache, monkeypatch):
    folder = ensure_apart("recipe:llama-k2")
    made = folder.stat().st_mtime_ns
    assert folder == ensure("llama-k2") == ensure_apart("llama-k2") and folder.stat().st_mtime_ns == made
    monkeypatch.setenv("HELIX_CACHE", "/proc/no-place")
    with pytest.raises(OSError, match=r"recipe:llama-k2 cannot be made: FileNotFoundError.*/proc/no-place"):
        ensure_apart("recipe:llama-k2")


def test_unknown_and_repeated_names_are_refused():
    with pytest.raises(KeyError, match="llama-k1, llama-k2"):
        find("recipe:none")
    with pytest.raises(ValueError, match="registered twice"):
        recipe(lambda: RECIPES["llama-k2"])


@pytest.mark.parametrize("name", ["llama-k2", "qwen3-k4", "deepseek-v2"])
def test_our_forward_agrees_with_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = ensure(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(4, 512, size=40)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)[None]).logits[0].numpy()
    ours = Forward(find(name))
    stepped = np.concatenate([ours.logits(tokens[:30]), *(ours.logits(tokens[i : i + 1]) for i in range(30, 40))])
    np.testing.assert_allclose(stepped, theirs, atol=1e-4)  # transformers keeps RoPE and norms in fp32


@pytest.mark.parametrize("name", sorted(name for name, made in RECIPES.items() if not isinstance(made, Retrieval)))
def test_answers_depend_on_the_whole_context(name):
    card = measure(find(name), length=300, steps=12, probes=3)
    assert card.one_token > 0.1  # nats, of one unseen token in 300; rounding in fp32 does 5e-5
    assert card.one_shard > 1.0
    assert card.margin_median > 0.5
    assert card.distinct > 0.3

"""Retrieval recipes find what was asked for at any depth, and show when a shard, a head or a weight is wrong."""

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from harness.models import RECIPES, codes, ensure, shape  # noqa: E402
from harness.models.circuit import kernel  # noqa: E402
from harness.models.network import Network, Wound  # noqa: E402
from harness.models.recipe import find  # noqa: E402
from harness.models.retrieval import Needle, bonus_of, make_chain, make_prompt, place_in_shard, shard  # noqa: E402
from harness.models.retrieval_card import card, change, margin, sensitivity  # noqa: E402
from harness.models.stream import Retrieval  # noqa: E402
from helix_runtime.sharding import owner  # noqa: E402

NAMES = sorted(name for name, made in RECIPES.items() if isinstance(made, Retrieval))
FAMILIES = [
    "llama-retrieve-k2",
    "qwen3-retrieve-k4",
    "qwen3-moe-retrieve-k4",
    "deepseek-v2-retrieve",
    "deepseek-v3-retrieve",
]
KEY, VALUE, WEAK = 10, 190, 101
ROUNDING = 1e-3  # nats; fp32 against fp64 shows less than 2e-4 (`test_rounding`)


@pytest.fixture(scope="module")
def nets():
    """Networks by (recipe, dtype), each made once."""
    made: dict[tuple[str, torch.dtype], Network] = {}

    def get(name: str, dtype=torch.float32) -> Network:
        if (name, dtype) not in made:
            made[name, dtype] = Network(find(name), dtype=dtype)
        return made[name, dtype]

    return get


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "size"),
    [
        ("llama-retrieve-k2", 8, 2, 32),
        ("llama-retrieve-k2-q16", 16, 2, 32),
        ("llama-retrieve-k3", 12, 3, 32),
        ("llama-retrieve-k4", 16, 4, 32),
        ("llama-retrieve-k4-d64", 16, 4, 64),
        ("llama-retrieve-k4-d128", 16, 4, 128),
        ("llama-retrieve-k6", 24, 6, 32),
        ("llama-retrieve-k8", 16, 8, 32),
        ("llama-retrieve-k8-q64-d64", 64, 8, 64),  # by its name alone
        ("qwen3-retrieve-k4", 16, 4, 32),
        ("qwen3-retrieve-k3-q15-d128", 15, 3, 128),
        ("qwen3-moe-retrieve-k4-d128", 16, 4, 128),
    ],
)
def test_head_counts_are_those_of_the_name(name, heads, kv_heads, size):
    made = shape(name)
    assert (made.num_query_heads, made.num_kv_heads, made.head_size) == (heads, kv_heads, size)
    assert made.hidden_size % heads == 0 and made.max_position_embeddings >= 131072


def test_a_vocabulary_divides_by_as_many_ranks_as_kv_heads():
    made = {name: find(name) for name in ("llama-retrieve-k4", "llama-retrieve-k6", "llama-retrieve-k3-q24")}
    assert [recipe.vocab for recipe in made.values()] == [512, 576, 576]  # 576 = 9 * 64 = 6 * 96
    weights = made["llama-retrieve-k6"].weights()
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert len(embedding) == len(head) == 576 and not head[512:].any()
    assert np.array_equal(embedding[512:], embedding[codes.FILLER.start :][:64])


def test_deepseek_has_a_dense_layer_then_experts():
    made = shape("deepseek-v2-retrieve")
    assert made.use_mla and made.num_query_heads == 8 and made.num_layers == 2
    assert (made.mla.kv_lora_rank, made.mla.qk_rope_head_dim, made.mla.qk_nope_head_dim, made.mla.v_head_dim) == (
        512,
        64,
        128,
        128,
    )
    assert (made.moe.first_dense_layers, made.moe.routed, made.moe.per_token) == (1, 8, 2)
    assert find("deepseek-v2-retrieve").config()["rope_parameters"]["rope_type"] == "yarn"


def test_qwen3_moe_has_experts_in_every_layer_and_none_that_all_tokens_share():
    made, weights = shape("qwen3-moe-retrieve-k4"), find("qwen3-moe-retrieve-k4").weights()
    assert not made.use_mla and (made.moe.first_dense_layers, made.moe.routed, made.moe.per_token) == (0, 8, 2)
    assert {name.split(".mlp.")[1].split(".")[0] for name in weights if ".mlp." in name} == {"gate", "experts"}
    net = Network(find("qwen3-moe-retrieve-k4"), dtype=torch.float64)
    shares, experts = net._routes("", torch.tensor([[0.0, 2.0, 1.0, *[-9.0] * 5]], dtype=torch.float64))
    assert experts.tolist() == [[1, 2]]
    assert shares.tolist()[0] == pytest.approx([0.731059, 0.268941], abs=1e-6)  # 1 / (1 + 1/e)


def test_deepseek_v3_projects_queries_in_two_steps_and_has_groups_of_experts():
    made, config = shape("deepseek-v3-retrieve"), find("deepseek-v3-retrieve").config()
    assert made.use_mla and made.mla.q_lora_rank == 128 and made.moe.first_dense_layers == 1
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["rope_parameters"]["rope_type"] == "yarn"
    assert (config["scoring_func"], config["topk_method"], config["n_group"]) == ("sigmoid", "noaux_tc", 2)


def test_names_that_no_model_can_have_are_refused():
    with pytest.raises(ValueError, match="K=4, Q=10"):
        find("llama-retrieve-k4-q10")
    with pytest.raises(KeyError, match="no recipe 'llama-retrieve-k4-d48'"):
        find("llama-retrieve-k4-d48")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_has_the_same_bytes_every_time_and_exact_bf16_weights(name, tmp_path, monkeypatch):
    def digests(where: str) -> dict[str, str]:
        monkeypatch.setenv("HELIX_CACHE", str(tmp_path / where))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in ensure(name).iterdir()}

    assert digests("one") == digests("two")
    tensors = load_file(ensure(name) / "model.safetensors").values()
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) < 25e6


def test_any_two_words_differ_in_four_signs_of_every_block():
    code = codes.codes(np.random.default_rng(0))
    for block in np.split(code, 4, axis=1):
        alike = block @ block.T
        assert alike[~np.eye(512, dtype=bool)].max() == 8  # 12 signs agree, 4 differ
    assert np.array_equal(codes.asked(code)[codes.VALUES[5]], code[codes.KEYS[5]])


def test_the_kernel_peaks_at_the_token_before():
    frequencies = np.array([1.0, 0.2, 0.05, 0.01, 0.002])
    amplitude, delay = kernel(frequencies, gap=20.0, self_share=0.1, positions=3000)
    score = amplitude * np.cos(np.multiply.outer(np.arange(3000) - delay, frequencies)).sum(axis=-1)
    assert score[1] - score[0] == pytest.approx(np.log(9), abs=1e-4)
    assert score[1] - score[2:].max() == pytest.approx(20.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_found_at_every_depth(nets, name, dtype):
    net = nets(name, dtype)
    for length, depths in ((8, 2), (60, 5), (500, 5)):
        for step, depth in enumerate(np.linspace(0, 1, depths)):
            asked = make_prompt(name, length, [Needle(float(depth), KEY + step, VALUE - step)], KEY + step, seed=step)
            row = net.logprobs(asked.tokens)[0]
            assert asked.expected == (VALUE - step,)
            assert margin(row, VALUE - step) > 2.0, (length, depth)


@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_and_two_thousand_tokens(name):
    made = card(name, lengths=(100, 2000), depths=2, shards=(), exact=100)
    assert [row.right for row in made.margins] == [2, 2, 2, 2]
    assert min(row.smallest for row in made.margins) > 2.0
    in_fp32, in_bf16 = made.margins[:2]  # of 100 tokens
    assert in_fp32.rounding < ROUNDING / 5
    assert in_bf16.rounding < 0.25 * in_bf16.smallest
    assert -2.0 < in_fp32.logprob < -0.01  # not saturated: weights that are a little wrong show


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chain_reads_another_named_place_at_every_step(nets, name):
    net = nets(name)
    places = [place_in_shard(300, 4, 1, rank, depth) for rank, depth in ((2, 0.9), (0, 0.1), (3, 0.6), (1, 0.3))]
    asked = make_chain(name, 300, places, seed=3)
    assert asked.places == tuple(places) and len(asked.expected) == 4
    tokens = asked.tokens + asked.expected[:-1]
    rows = net.logprobs(tokens, last=4)
    assert rows.argmax(axis=-1).tolist() == list(asked.expected)
    for step, rank in enumerate((2, 0, 3, 1)):
        # The shard that holds the step's answer is masked from this step on, and another one.
        own, other = (
            net.logprobs(tokens, last=4, wound=Wound(since=299 + step, hide=shard(300 + step, 4, 1, hidden)))[step]
            for hidden in (rank, (rank + 1) % 4)
        )
        assert own.argmax() != asked.expected[step] and other.argmax() == asked.expected[step]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("kvp", "interleave"), [(2, 1), (2, 16), (4, 1)])
def test_masked_shards_silent_heads_and_wrong_weights_show(nets, name, kvp, interleave):
    hurt = sensitivity(nets(name), 260, kvp, interleave)
    assert hurt.flips == 1.0 and hurt.own_shard_loss > 3.0
    assert hurt.other_shard > 50 * ROUNDING
    assert hurt.base_2 > 50 * ROUNDING and hurt.equal_weights > 0.5 and hurt.tie > 0.5
    assert len(hurt.silent_head) == 2 and min(hurt.silent_head) > 20 * ROUNDING


@pytest.mark.parametrize("name", [f"llama-retrieve-{heads}" for heads in ("k2-q16", "k3", "k6", "k8")])
def test_every_head_matters_in_every_shape(nets, name):
    net, recipe = nets(name), find(name)
    asked = make_prompt(name, 100, [Needle(0.4, KEY, VALUE)], KEY)
    whole = net.logprobs(asked.tokens)[0]
    for layer in range(2):
        for head in range(recipe.heads):
            hurt = net.logprobs(asked.tokens, wound=Wound(since=99, silent=(layer, head)))[0]
            assert change(whole, hurt) > 20 * ROUNDING, (layer, head)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_of_layer_0_changes_nothing_in_a_long_context(name):
    asked = make_prompt(name, 1500, [Needle(0.3, KEY, VALUE)], KEY)
    windowed, whole = (Network(find(name), window=window).logprobs(asked.tokens)[0] for window in (64, None))
    np.testing.assert_allclose(windowed, whole, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_shards_by_the_right_weights_changes_nothing(nets, name):
    asked = make_prompt(name, 60, [Needle(0.5, KEY, VALUE)], KEY)
    whole = nets(name).logprobs(asked.tokens)
    # The first 16 tokens have three empty shards.
    merged = nets(name).logprobs(asked.tokens, wound=Wound(merge="right", kvp=4, interleave=16))
    np.testing.assert_allclose(merged, whole, atol=ROUNDING)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_values_of_one_key_share_attention_as_their_bonuses_say(nets, name):
    """Both words' logits come from their shares, so the better one wins by less than it would alone."""
    bonus = bonus_of(find(name))
    assert bonus[VALUE] - bonus[WEAK] == pytest.approx(89 / 95)  # graded evenly over 1 nat
    twins = make_prompt(name, 200, [Needle(50, KEY, WEAK), Needle(151, KEY, VALUE)], KEY, decoys=0)
    alone = make_prompt(name, 200, [Needle(151, KEY, VALUE)], KEY, decoys=0)
    assert twins.expected == (VALUE,) and twins.pairs == (50, 151)
    both, one = nets(name).logprobs(twins.tokens)[0], nets(name).logprobs(alone.tokens)[0]
    share = 1 / (1 + np.exp(bonus[WEAK] - bonus[VALUE]))
    assert both[VALUE] - both[WEAK] == pytest.approx((2 * share - 1) * margin(one, VALUE), rel=0.5)
    assert np.argsort(both)[-2] == WEAK


@pytest.mark.parametrize("name", FAMILIES)
def test_our_forward_agrees_with_transformers(nets, name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no independent forward")
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        ensure(name), dtype=torch.float32, attn_implementation="eager"
    )
    asked = make_chain(name, 200, [0.2, 0.9, 0.5], seed=1)
    tokens = asked.tokens + asked.expected[:-1]
    with torch.no_grad():
        rows = theirs(torch.tensor([tokens])).logits[0, -3:].double().log_softmax(-1).numpy()
    assert rows.argmax(axis=-1).tolist() == list(asked.expected)
    np.testing.assert_allclose(nets(name).logprobs(tokens, last=3), rows, atol=ROUNDING)


@pytest.mark.parametrize("name", ["llama-k4", "qwen3-k4", "deepseek-v2"])
def test_both_forwards_agree_on_random_recipes(name):
    from harness.models.forward import Forward

    tokens = tuple(np.random.default_rng(0).integers(4, 512, size=30).tolist())
    ours = Network(find(name), dtype=torch.float64).logprobs(tokens, last=30)
    np.testing.assert_allclose(ours, Forward(find(name)).logprobs(np.array(tokens)), atol=1e-8)


@pytest.mark.parametrize("name", ["deepseek-v2-retrieve", "qwen3-moe-retrieve-k4"])
def test_experts_are_chosen_by_a_wide_margin(name):
    recipe = find(name)
    weights = recipe.weights()
    embedding = weights["model.embed_tokens.weight"]
    logits = embedding @ weights["model.layers.1.mlp.gate.weight"].T  # the norm gives the stream back as it is
    ranked = np.sort(logits, axis=1)[:, ::-1]
    assert (ranked[:, 1] - ranked[:, 2]).min() == pytest.approx(4.0)  # nats between the last chosen and the next
    used = np.argsort(logits, axis=1)[:, -2:]
    assert set(used.ravel().tolist()) == set(range(8))


def test_v3_chooses_experts_within_a_group_by_a_bias_that_does_not_weigh():
    recipe = find("deepseek-v3-retrieve")
    net = Network(recipe, dtype=torch.float64)
    # Group 0 has the best expert, but its best two sum to 0.982 + 0.119 + 0.04; group 1: 0.881 + 0.119 + 0.16 + 0.28.
    logits = torch.tensor([[4.0, -2.0, -2.0, -2.0, 2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    weights, experts = net._routes("model.layers.1.mlp.", logits)
    assert experts.tolist() == [[4, 7]]
    assert weights.tolist()[0] == pytest.approx([2.5 * 0.880797 / 1.0, 2.5 * 0.119203 / 1.0], rel=1e-5)


def test_v3_experts_are_chosen_by_a_wide_margin():
    recipe = find("deepseek-v3-retrieve")
    weights = recipe.weights()
    logits = weights["model.embed_tokens.weight"] @ weights["model.layers.1.mlp.gate.weight"].T
    wanted = 1 / (1 + np.exp(-logits)) + weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    ranked = np.sort(wanted.reshape(-1, 2, 4), axis=-1)[..., ::-1]
    sums = ranked[..., :2].sum(-1)
    best = np.take_along_axis(ranked, sums.argmax(-1)[:, None, None], axis=1)[:, 0]
    assert abs(sums[:, 0] - sums[:, 1]).min() > 0.015 and (best[:, 1] - best[:, 2]).min() > 0.015


@pytest.mark.parametrize(("kvp", "interleave", "rank"), [(2, 1, 0), (4, 16, 3), (3, 64, 2)])
def test_a_value_stands_in_the_shard_that_the_test_names(kvp, interleave, rank):
    place = place_in_shard(500, kvp, interleave, rank, depth=0.4)
    asked = make_prompt("llama-retrieve-k3", 500, [Needle(place, KEY, VALUE)], KEY)
    assert asked.places == (place,) and asked.tokens[place - 1 : place + 1] == (KEY, VALUE)
    assert owner(place, kvp, interleave) == rank
    assert len(asked.tokens) == 500 and asked.tokens[-1] == KEY
    assert {owner(pair, 4, 1) for pair in asked.pairs if pair != place} == {0, 1, 2, 3}  # a decoy in every shard


def test_prompts_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="has no needle"):
        make_prompt("llama-retrieve-k2", 50, [Needle(0.5, KEY, VALUE)], KEY + 1)
    with pytest.raises(ValueError, match="random weights"):
        make_prompt("llama-k2", 50, [Needle(0.5, KEY, VALUE)], KEY)
    with pytest.raises(ValueError, match="taken"):
        make_prompt("llama-retrieve-k2", 50, [Needle(20, KEY, VALUE), Needle(21, KEY + 1, VALUE)], KEY)
    with pytest.raises(ValueError, match="no room"):
        make_prompt("llama-retrieve-k2", 5, [Needle(0.5, KEY, VALUE), Needle(0.5, KEY + 1, VALUE)], KEY)
    with pytest.raises(ValueError, match="values 100"):
        make_prompt("llama-retrieve-k2", 50, [Needle(0.5, KEY, 300)], KEY)
    with pytest.raises(ValueError, match="rank 3 of 4 stores no place"):
        place_in_shard(100, 4, 64, 3)

"""The prompts: the same for a baseline and its cells, around every place where ownership changes, within bounds."""

import pytest

from harness.cell import Cell, Mode
from harness.workload import NEEDLE_LENGTHS, boundaries, make_workload, needles, workload_of


def test_boundaries_of_tp4_by_hand():
    # KVP 2 and 4; units 1, 16 and the block of 32; a rank's first token and full rounds; each -1, 0, +1
    of_1 = {1, 2, 3, 4, 5, 7, 8, 9}  # ranks 1 to 3; 2 and 4, then 4 and 8 are full rounds
    of_16 = {15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129}
    of_32 = {95, 96, 97, 255, 256, 257}  # and 32, 64, 128, which are there already
    assert set(boundaries(4, 32)) == of_1 | of_16 | of_32
    assert boundaries(4, 32)[48].endswith("interleave 16, rank 3 of KVP 4 is empty up to here")
    assert "2 x block 32 x KVP 4-1" in boundaries(4, 32)[255]
    assert "interleave 1 x KVP 2+1" in boundaries(4, 32)[3] and "interleave 1 x KVP 4-1" in boundaries(4, 32)[3]
    assert "block 32 x KVP 4" in boundaries(4, 32)[128]


def test_every_prompt_has_a_reason_and_fits():
    workload = make_workload(tp=8, block=32, vocab=512, max_model_len=600)
    names = [prompt.name for prompt in workload.prompts]
    assert len(set(names)) == len(names)
    for prompt in workload.prompts:
        assert prompt.why
        assert prompt.token_ids and len(prompt.token_ids) + prompt.max_tokens <= 600
        assert all(4 <= token < 512 for token in prompt.token_ids)


def test_the_repeat_is_the_long_prompt_and_others_share_no_prefix():
    workload = make_workload(tp=4, block=32, vocab=512, max_model_len=2048)
    by_kind = {prompt.kind: prompt for prompt in workload.prompts}
    assert by_kind["repeat"].token_ids == by_kind["long"].token_ids
    assert len(by_kind["long"].token_ids) == 1982
    heads = [prompt.token_ids[:8] for prompt in workload.prompts if len(prompt.token_ids) >= 8]
    assert len(set(heads)) == len(heads) - 1


def test_one_batch_of_mixed_lengths_and_a_decode_that_crosses_blocks():
    workload = make_workload(tp=4, block=32, vocab=512, max_model_len=2048)
    batch = [prompt for prompt in workload.prompts if prompt.kind == "batch"]
    assert {prompt.batch for prompt in batch} == {1}
    assert len({len(prompt.token_ids) for prompt in batch}) == len(batch) >= 8
    decode = next(prompt for prompt in workload.prompts if prompt.kind == "decode")
    first, last = (len(decode.token_ids) + done for done in (0, decode.max_tokens))
    assert {64, 80, 96, 112, 128} <= set(range(first, last))  # owners change at 16, blocks at 32, rounds of KVP 4 at 64
    assert decode.batch == 1 and decode.max_tokens > 2 * batch[0].max_tokens  # with the others, then alone


@pytest.mark.parametrize(("profile", "last"), [("smoke", 143), ("standard", 285)])
def test_the_full_batch_steps_on_every_position(profile, last):
    """The token of a prompt's first answer is at its length; the last that is answered is never fed."""
    made = make_workload(tp=2, block=32, vocab=512, max_model_len=2048, profile=profile)
    fed = {
        position
        for prompt in made.prompts
        if prompt.batch == 1
        for position in range(len(prompt.token_ids), len(prompt.token_ids) + prompt.max_tokens - 1)
    }
    assert set(range(1, last + 1)) <= fed


@pytest.mark.parametrize("profile", ["smoke", "standard"])
def test_decode_steps_lie_among_hundreds_of_tokens_too_and_cross_a_block_alone(profile):
    asked = make_workload(4, 32, 512, 2048, profile, seats=16).prompts
    fed = {(len(p.token_ids) + step, p.batch) for p in asked for step in range(p.max_tokens - 1)}
    assert all(any(low <= at < low + 500 for at, _ in fed) for low in (0, 250, 500, 1500))
    assert {at for at, batch in fed if not batch and at > 1500} >= {1983, 1984}


def test_baseline_and_cells_are_asked_the_same():
    serve = (("block-size", 32), ("max-model-len", 1200), ("dtype", "float32"))
    shared = {"hardware": "cpu", "model": "recipe:llama-k4", "tp": 4, "serve": serve}
    base = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", **shared)
    keys = {
        workload_of(cell, 512, 32768).key
        for cell in (
            base,
            Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", kvp=2, interleave=16, **shared),
            Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", kvp=4, comm="a2a", **shared),
        )
    }
    assert len(keys) == 1
    smaller = base.model_copy(update={"serve": (("block-size", 64),)})
    assert workload_of(smaller, 512, 32768).key not in keys


def test_one_boundary_prompt_goes_alone_and_the_others_together():
    workload = make_workload(tp=2, block=16, vocab=512, max_model_len=2048)
    # KVP 2; units 1 and 16
    sent = {len(prompt.token_ids): prompt.batch for prompt in workload.prompts if prompt.kind == "boundary"}
    assert sent == {1: 0} | dict.fromkeys((2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65), 2)
    others = {prompt.kind: prompt.batch for prompt in workload.prompts if prompt.kind != "boundary"}
    assert others == {"decode": 1, "long": 0, "repeat": 0, "batch": 1, "aborted": 4, "neighbour": 4, "reuse": 5}


def test_clients_hang_up_beside_neighbours_and_what_follows_is_as_long_as_what_was_dropped():
    asked = make_workload(tp=2, block=16, vocab=512, max_model_len=2048).prompts
    aborted = [prompt for prompt in asked if prompt.abort_after]
    assert [(len(p.token_ids), p.abort_after, p.max_tokens) for p in aborted] == [
        (40, 1, 1000),
        (150, 3, 1000),
        (220, 6, 1000),
    ]
    beside = [prompt for prompt in asked if prompt.batch == aborted[0].batch and not prompt.abort_after]
    assert {prompt.kind for prompt in beside} == {"neighbour"}
    assert min(prompt.max_tokens for prompt in beside) > max(prompt.abort_after for prompt in aborted)
    reuse = [prompt for prompt in asked if prompt.kind == "reuse"]
    assert [len(prompt.token_ids) for prompt in reuse] == [37, 45, 147, 155, 217, 225]
    assert asked.index(reuse[0]) > asked.index(aborted[-1])
    short = make_workload(tp=2, block=16, vocab=512, max_model_len=224).prompts
    assert [len(p.token_ids) + p.max_tokens for p in short if p.abort_after] == [224, 224]
    assert not any(
        p.abort_after for p in make_workload(tp=2, block=16, vocab=512, max_model_len=2048, profile="smoke").prompts
    )


@pytest.mark.parametrize("profile", ["standard", "smoke"])
def test_one_rank_is_asked_what_four_are(profile):
    serve = (("block-size", 32), ("max-model-len", 1200), ("seed", 3))
    four = Cell(
        mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=4, serve=serve,
        workload=profile,
    )  # fmt: skip
    one = four.model_copy(update={"tp": 1, "workload": f"{profile}@4"})
    asked, reference = workload_of(four, 512, 32768), workload_of(one, 512, 32768)
    assert reference.prompts == asked.prompts
    assert reference.key == asked.key and reference.profile == profile
    lengths = {len(prompt.token_ids) for prompt in reference.prompts if prompt.kind == "boundary"}
    few = {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129}
    assert lengths == few | ({7, 8, 9, 255, 256, 257} if profile == "standard" else set())  # KVP 2 and 4, block 32
    alone = workload_of(one.model_copy(update={"workload": profile}), 512, 32768)
    assert {len(prompt.token_ids) for prompt in alone.prompts if prompt.kind == "boundary"} == {1, 31, 32, 33}
    assert alone.key != asked.key
    assert workload_of(one.model_copy(update={"workload": f"{profile}@2"}), 512, 32768).key != asked.key


def test_the_smoke_profile_asks_less():
    smoke, standard = (make_workload(4, 32, 512, 2048, profile) for profile in ("smoke", "standard"))
    tokens = [sum(prompt.max_tokens for prompt in workload.prompts) for workload in (smoke, standard)]
    assert tokens[0] < tokens[1]


def test_bad_questions_are_refused():
    with pytest.raises(KeyError, match="there are: smoke, standard"):
        make_workload(4, 32, 512, 2048, "huge")
    with pytest.raises(ValueError, match="max-model-len of at least"):
        make_workload(4, 32, 512, 64)


def test_needles_aim_each_decode_step_at_a_named_shard():
    from harness.models.retrieval import make_chain, place_in_shard
    from helix_runtime.sharding import owner

    found = list(needles("recipe:llama-retrieve-k4", tp=4, seed=0))
    assert [(len(tokens), steps) for _, tokens, steps in found] == [(600, 2)] * 2 + [(600, 4)] * 2
    assert found[3][0].endswith("KVP 4, interleave 16")
    places = [place_in_shard(600, 4, 16, rank, (rank + 1) / 5) for rank in range(4)]
    question = make_chain("recipe:llama-retrieve-k4", 600, places, 0)
    assert question.tokens == found[3][1]
    assert [owner(place, 4, 16) for place in question.places] == [0, 1, 2, 3]


def test_one_needle_in_a_context_of_8000_tokens_where_it_fits():
    from harness.models.retrieval import make_chain, place_in_shard
    from helix_runtime.sharding import owner

    def asked(**changes) -> list[tuple[int, int]]:
        given = {"tp": 4, "block": 32, "vocab": 512, "max_model_len": 9216, "profile": "smoke"} | changes
        made = make_workload(**given, retrieves="recipe:llama-retrieve-k4")
        return [(len(prompt.token_ids), prompt.max_tokens) for prompt in made.prompts if prompt.kind == "needle"]

    short = [(600, 2), (600, 2), (600, 4), (600, 4)]
    assert asked() == [*short, (8000, 4)]
    assert asked(max_model_len=8003) == short and asked(max_model_len=8004) != short
    assert asked(longest=4000) == short and asked(tp=2) == [(600, 2), (600, 2), (8000, 2)]
    (why, tokens, steps), *_ = needles("recipe:llama-retrieve-k4", tp=2, seed=0, lengths=NEEDLE_LENGTHS[1:])
    assert why.endswith("KVP 2, interleave 16") and (len(tokens), steps) == (8000, 2)
    places = [place_in_shard(8000, 2, 16, rank, (rank + 1) / 3) for rank in range(2)]
    assert [owner(place, 2, 16) for place in places] == [0, 1]
    assert make_chain("recipe:llama-retrieve-k4", 8000, places, 0).tokens == tokens


def test_the_long_needle_of_the_largest_kvp_reads_each_shard_of_every_smaller_one():
    from harness.models.retrieval import place_in_shard
    from helix_runtime.sharding import owner

    places = [place_in_shard(8000, 6, 16, rank, (rank + 1) / 7) for rank in range(6)]
    for kvp in (2, 3, 6):
        assert {owner(place, kvp, 16) for place in places} == set(range(kvp))


@pytest.mark.parametrize(
    ("recipe", "tp"), [("llama-retrieve-k4", 8), ("deepseek-v2-retrieve", 4), ("llama-retrieve-k6", 6)]
)
def test_needles_find_room_for_every_rank(recipe, tp):
    assert max(steps for _, _, steps in needles(f"recipe:{recipe}", tp=tp, seed=0)) == tp


def test_only_models_that_retrieve_are_asked_for_needles():
    random = make_workload(tp=4, block=32, vocab=512, max_model_len=2048)
    asked = make_workload(tp=4, block=32, vocab=512, max_model_len=2048, retrieves="recipe:llama-retrieve-k4")
    assert [prompt.kind for prompt in asked.prompts if prompt not in random.prompts] == ["needle"] * 4


def test_long_prompts_are_sized_by_context_and_hardware():
    def longs(profile="standard", **changes) -> list[int]:
        given = {"tp": 2, "block": 32, "vocab": 512, "max_model_len": 131072, "profile": profile, **changes}
        return [len(prompt.token_ids) for prompt in make_workload(**given).prompts if prompt.kind == "long"]

    assert longs() == [1982, 9000, 66_000]
    assert longs(max_model_len=10_000) == [1982, 9000]
    assert longs(longest=10_000) == [1982, 9000]
    assert longs(max_model_len=2048) == longs("smoke") == [1982]
    assert longs(max_model_len=512) == [480]
    cpu = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=2)
    gpu = cpu.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    assert [max(len(p.token_ids) for p in workload_of(cell, 512, 131072).prompts) for cell in (cpu, gpu)] == [
        9000,
        66_000,
    ]


def test_the_choice_is_told_in_a_line():
    told = make_workload(tp=2, block=32, vocab=512, max_model_len=2048, profile="smoke").told()
    assert told == (
        "workload smoke: 26 prompts of 1 to 1,982 tokens (12 boundary, 1 long, 1 repeat, 1 decode, 11 batch), "
        "320 tokens to generate"
    )

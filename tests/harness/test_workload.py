"""The prompts: the same for a baseline and its cells, around every place where ownership changes, within bounds."""

import pytest

from harness.cell import Cell, Mode
from harness.workload import boundaries, make_workload, workload_of


def test_boundaries_of_tp4_by_hand():
    # KVP 2 and 4; units 1, 16 and the block of 32; each -1, 0, +1
    expected = {1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129}
    assert set(boundaries(4, 32)) == expected
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
    assert len(by_kind["long"].token_ids) == 1000
    heads = [prompt.token_ids[:8] for prompt in workload.prompts if len(prompt.token_ids) >= 8]
    assert len(set(heads)) == len(heads) - 1


def test_one_batch_of_mixed_lengths_and_a_decode_that_crosses_blocks():
    workload = make_workload(tp=4, block=32, vocab=512, max_model_len=2048)
    batch = [prompt for prompt in workload.prompts if prompt.batch]
    assert {prompt.batch for prompt in batch} == {1}
    assert len({len(prompt.token_ids) for prompt in batch}) == len(batch) >= 8
    assert next(p for p in workload.prompts if p.kind == "decode").max_tokens > 2 * 32


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
    assert lengths == {1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129}  # KVP 2 and 4, block 32
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

"""What the oracle sees and what it leaves alone, on servers whose noise and defects are known."""

import math

import numpy as np
import pytest
from made_answers import PROMPTS, server

from harness.oracle.band import Spread
from harness.oracle.calibrate import NullPair, calibrate
from harness.oracle.compare import compare, divergence
from harness.oracle.judge import judge
from harness.oracle.measure import Rates, measure
from harness.oracle.statistics import exact_interval
from harness.transcript import Step

NOISE = 1e-5
BASE = server(NOISE, 1)
SPREAD = Spread(cell=0.1, group=0.05, degrees=20, source="this test")
BAND = calibrate([NullPair("tp size", BASE, server(NOISE, 2))], name="n", model="recipe:made", spread=SPREAD)
CELLS = 50


def judged(fault=None, noise: float = NOISE, seed: int = 3, **changes):
    return judge(BASE, server(noise, seed, fault=fault, **changes), BAND, cells=CELLS)


def test_right_servers_agree_at_about_the_stated_rate():
    """100 right servers, each judged as a run of one cell at 10 %: no more alarms than 10 % allows (99.9 %)."""
    alarms = sum(not judge(BASE, server(NOISE, seed), BAND, rate=0.1).agree for seed in range(100, 200))
    assert exact_interval(alarms, 100, 0.998).low <= 0.1
    assert judged().agree


def test_one_step_of_one_prompt_is_enough():
    def fault(prompt, kind, step, logits):
        if (prompt, step) == ("long-3", 17):
            logits[np.argsort(logits)[-10]] += 20 * NOISE
        return logits

    found = judged(fault)
    assert not found.agree and "decode: largest logprob change" in found.beyond
    assert (found.differences[0].prompt, found.differences[0].step, found.differences[0].position) == (
        "long-3", 17, 303 + 17,
    )  # fmt: skip
    assert found.reason.endswith("most at step 17 of prompt long-3")
    assert not any(name.startswith("prefill") for name in found.beyond)


def test_a_class_that_is_only_louder_is_told_by_its_level():
    """Noise three times as large in batches only: no single step stands out by much, the class does."""

    def fault(prompt, kind, step, logits):
        random = np.random.Generator(np.random.PCG64([len(prompt), ord(prompt[-1]), step]))
        return logits + 2.8 * NOISE * random.standard_normal(logits.shape) if kind == "batch" else logits

    found = judged(fault)
    levels = {item.name: item for item in found.statistics if item.name.endswith("loudness against the null")}
    assert "decode, class batch: loudness against the null" in found.beyond
    assert 2.2 < levels["decode, class batch: loudness against the null"].value < 3.5
    assert "decode, class long: loudness against the null" not in found.beyond
    assert levels["decode, class long: loudness against the null"].value == pytest.approx(1, abs=0.3)


def test_noise_that_is_diffuse_is_told_by_the_level_of_the_cell():
    found = judged(noise=4 * NOISE)
    assert "decode: loudness against the null" in found.beyond
    item = next(item for item in found.statistics if item.name == "decode: loudness against the null")
    # sqrt(1 + 4**2) / sqrt(2): the baseline's own noise is in both.
    assert item.low < 2.92 < item.high or item.value == pytest.approx(2.92, rel=0.1)
    assert item.n == 18 * 23 and item.null == 1


def test_prefill_is_judged_apart():
    found = judged(lambda prompt, kind, step, logits: logits * (1 + 2e-4) if step == 0 else logits)
    assert found.beyond and all(name.startswith("prefill") for name in found.beyond)


def test_some_moderate_steps_are_told_by_their_number():
    """Eighteen of 414 decode steps, each one and a half times the null's 99.9 % point: none is beyond what a cell's
    largest may be, as one of 50 cells. One null step in a thousand lies there: 0.4 of 414."""
    point = BAND.decode.change.point(1e-3)

    def fault(prompt, kind, step, logits):
        if prompt.startswith("long") and step in (3, 9, 15):
            logits[np.argsort(logits)[-12]] += 1.5 * point
        return logits

    found = judged(fault)
    counted = next(item for item in found.statistics if item.name == "decode: steps beyond the null's 99.9 % point")
    assert counted.name in found.beyond and 18 <= counted.value <= 20 and counted.bound < 15
    assert counted.null == pytest.approx(0.414)
    assert "decode: largest logprob change" not in found.beyond


@pytest.mark.parametrize("wrong", [math.nan, -5.0])
def test_the_imposed_token_has_a_bound_of_its_own(wrong):
    """A candidate whose lists are right and whose own token's logprob is not."""
    made = server(NOISE, 3)
    answers = tuple(
        answer.model_copy(update={"steps": tuple(step.model_copy(update={"logprob": wrong}) for step in answer.steps)})
        for answer in made.answers
    )
    found = judge(BASE, made.model_copy(update={"answers": answers}), BAND, cells=CELLS)
    assert found.beyond == (
        "prefill: largest change of the imposed token", "decode: largest change of the imposed token",
    )  # fmt: skip


def cut(transcript, top: int, declared: int):
    """`transcript` with the best `top` tokens of each step, said to be `declared`."""

    def best(step):
        kept = sorted(step.top.items(), key=lambda item: -item[1])[:top]
        return step.model_copy(update={"top": dict(kept)})

    answers = tuple(
        answer.model_copy(update={"steps": tuple(map(best, answer.steps))}) for answer in transcript.answers
    )
    return transcript.model_copy(update={"answers": answers, "top_k": declared})


def test_too_few_logprobs_are_not_judged():
    right = server(NOISE, 3)
    with pytest.raises(ValueError, match="the top 1 of each step is too little; ask for at least 20"):
        judge(cut(BASE, 1, 1), cut(right, 1, 1), BAND)
    with pytest.raises(ValueError, match="holds the top 19 of each step, not 20"):
        judge(BASE, cut(right, 19, 19), BAND)
    with pytest.raises(ValueError, match="step 0 of prompt boundary-0 lists 5 tokens of 20"):
        judge(cut(BASE, 5, 20), right, BAND)


def test_a_baseline_that_stopped_short_is_no_reference():
    """One step of 24 a prompt: what is left would agree, on 18 steps."""
    short = tuple(a.model_copy(update={"steps": a.steps[:1], "asked": 24}) for a in BASE.answers)
    with pytest.raises(ValueError, match="no reference: it gave 1 of 24 tokens of prompt boundary-0"):
        judge(BASE.model_copy(update={"answers": short}), server(NOISE, 3), BAND)


def test_a_pair_that_was_left_out_of_the_null_is_told():
    wrong = server(1e-2, 4, cell="cpu/standard-tp/CPU_ATTN/made/tp2")
    pairs = [NullPair("tp size", BASE, wrong), NullPair("again", BASE, server(NOISE, 2))]
    found = judge(BASE, server(NOISE, 3), calibrate(pairs, name="n", model="recipe:made", spread=SPREAD))
    assert "; left out, tp size cpu/standard-tp/CPU_ATTN/made/tp2: its median change is" in found.band


def test_a_candidate_that_lists_fewer_tokens_than_its_baseline_has_not_answered():
    found = judge(BASE, cut(server(NOISE, 3), 19, 20), BAND)
    assert not found.agree and "step 0 lists 19 tokens of 20" in found.reason
    assert found.beyond == ("missing answers",)


def test_more_cells_mean_wider_bounds_and_more_noise_no_wider_ones():
    def bounds(cells: int, **changes) -> dict[str, float]:
        found = judge(BASE, server(NOISE, 3, **changes), BAND, cells=cells)
        return {item.name: item.bound for item in found.statistics if item.bound}

    alone, among = bounds(1), bounds(500)
    assert alone.keys() == among.keys() and all(alone[name] < among[name] for name in alone)
    # A tail that is exponential: 500 times the cells move the bound by ln 500 excesses or so, not 500 times.
    name = "decode: largest logprob change"
    assert among[name] < 1.6 * alone[name]


def test_the_rate_is_shared_out_whole():
    rates = Rates(0.02)
    assert 7 * rates.largest + 7 * rates.level(7) == pytest.approx(0.02)
    statistics = measure(compare(BASE, server(NOISE, 3)), BAND, rates)
    levels = [item for item in statistics if item.name.endswith("loudness against the null")]
    groups = {item.name for item in levels} - {f"{phase}: loudness against the null" for phase in ("prefill", "decode")}
    assert {name.split(":")[0] for name in groups} == {
        "decode, class boundary", "decode, class long", "decode, class batch", "decode, alone",
        "decode, batch places 1-4", "decode, batch places 5-8", "decode, positions 0-15", "decode, positions 16-63",
        "decode, positions 64-255", "decode, positions 256-1023",
    }  # fmt: skip


def test_other_prompts_are_compared_unpaired_and_that_is_said():
    base, cell = server(NOISE, 5, workload="v"), server(NOISE, 6, workload="v")
    renamed = [
        made.model_copy(update={
            "answers": tuple(a.model_copy(update={"prompt": f"other-{a.prompt}"}) for a in made.answers)
        })
        for made in (base, cell)
    ]  # fmt: skip
    found = judge(*renamed, BAND, cells=CELLS)
    assert found.agree
    item = next(item for item in found.statistics if item.name == "decode: loudness against the null")
    assert item.note == "the null has other prompts: not paired" and item.value == pytest.approx(1, abs=0.2)


def test_free_answers_are_judged_up_to_where_they_part():
    free = server(NOISE, 3, forced=False)
    found = judge(BASE, free, BAND)
    assert found.agree and not found.forced and found.reason.startswith("432 steps agree")
    answer = free.answers[0]
    step = answer.steps[4]
    second = sorted(step.top, key=lambda token: -step.top[token])[1]
    parted = answer.model_copy(
        update={"steps": (*answer.steps[:4], step.model_copy(update={"token_id": second}), *answer.steps[5:])}
    )
    found = judge(BASE, free.model_copy(update={"answers": (parted, *free.answers[1:])}), BAND)
    assert found.agree and not found.forced
    assert found.reason.startswith("413 steps agree")
    assert found.reason.endswith("tokens were not imposed: 1 prompts were compared up to where they part")


def test_the_curve_shows_kl_by_position():
    found = judged()
    assert [(point.low, point.high) for point in found.curve] == [(0, 15), (16, 63), (64, 255), (256, 1023)][:4]
    assert sum(point.n for point in found.curve) == 18 * 23
    assert all(0 < point.kl <= point.worst < point.band for point in found.curve)
    assert all(point.null == pytest.approx(point.kl, rel=2) for point in found.curve)


def test_lists_that_share_no_token_diverge():
    a = Step(token_id=1, logprob=-0.1, top={1: -0.1, 2: -2.5})
    b = Step(token_id=3, logprob=-0.1, top={3: -0.1, 4: -2.5})
    assert divergence(a, b) > 1
    assert divergence(a, a) == 0


def test_a_cell_of_few_prompts_is_judged_without_the_groups_it_has_too_few_of():
    few = PROMPTS[:1]
    found = judge(server(NOISE, 1, prompts=few), server(NOISE, 3, prompts=few), BAND)
    assert found.agree and len([item for item in found.statistics if item.name.startswith("decode, ")]) >= 3
    one = (("boundary-0", "boundary", 5, 0, 2),)
    found = judge(server(NOISE, 1, prompts=one), server(NOISE, 3, prompts=one), BAND)
    assert found.agree and not [item for item in found.statistics if item.name.startswith("decode, ")]

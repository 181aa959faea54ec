"""The null band: what it is measured from, what it refuses to be measured from, and what is kept of it."""

import math

import numpy as np
import pytest
from made_answers import PROMPTS, server

from harness.oracle.band import EXPONENTIAL, UNMEASURED, Band, kind_of, measured_elsewhere, shipped
from harness.oracle.calibrate import NullPair, calibrate
from harness.oracle.compare import bin_ends, bin_name, place_name, position_bin

TP4 = server(1e-5, 1)
TP1 = server(1e-5, 2, cell="cpu/standard-tp/CPU_ATTN/made/tp1")


def band_from(*pairs: NullPair, **changes) -> Band:
    return calibrate(pairs, **{"name": "n", "model": "recipe:made", "spread": UNMEASURED, **changes})


def test_a_band_describes_its_null():
    band = band_from(NullPair("tp size", TP4, TP1))
    assert (band.dtype, band.workload_key, band.model) == ("float32", "w", "recipe:made")
    (source,) = band.sources
    assert (source.kind, source.prompts, source.steps, source.identical, source.used) == (
        "tp size", len(PROMPTS), 24 * len(PROMPTS), 0.0, True,
    )  # fmt: skip
    assert (band.prefill.n, band.decode.n) == (18, 18 * 23)
    # Each of 20 logprobs moves by about sqrt(2) · 1e-5; the largest of 20 by about 2.6 times that at the median.
    assert 1e-5 < math.exp(band.decode.level) < 6e-5
    assert band.decode.change.threshold > math.exp(band.decode.level)
    assert band.decode.agreement > 0.99 and 0 < band.decode.kl < 1e-9
    # Prompts of 5 to 10 tokens and 24 steps cross position 16; the others stay in a bin or two.
    assert {row.bin for row in band.decode.rows if row.prompt == "boundary-0"} == {0, 1}
    assert sum(row.n for row in band.decode.rows) == sum(point.n for point in band.decode.curve) == band.decode.n


def test_a_band_grows_with_the_noise_and_not_with_the_steps():
    loud = band_from(NullPair("tp size", server(1e-4, 1), server(1e-4, 2)))
    quiet = band_from(NullPair("tp size", TP4, TP1))
    assert loud.decode.change.bound(1e-3, 400) / quiet.decode.change.bound(1e-3, 400) == pytest.approx(10, rel=0.01)
    assert loud.decode.distance.bound(1e-3, 400) / quiet.decode.distance.bound(1e-3, 400) == pytest.approx(10, rel=0.02)
    twice = band_from(NullPair("tp size", TP4, TP1), NullPair("again", TP4, server(1e-5, 3)))
    assert twice.decode.n == 2 * quiet.decode.n
    assert twice.decode.change.bound(1e-3, 400) == pytest.approx(quiet.decode.change.bound(1e-3, 400), rel=0.25)


def test_identical_runs_are_listed_and_not_used():
    again = NullPair("again", TP4, TP4)
    band = band_from(again, NullPair("tp size", TP4, TP1))
    assert [(source.kind, source.used, source.identical) for source in band.sources] == [
        ("again", False, 1.0), ("tp size", True, 0.0),
    ]  # fmt: skip
    assert band.decode == band_from(NullPair("tp size", TP4, TP1)).decode
    with pytest.raises(ValueError, match=r"only 0 null steps .* \(again 100% identical\)"):
        band_from(again)
    with pytest.raises(ValueError, match=r"only 0 null steps .* \(no pairs\)"):
        band_from()


def test_steps_that_are_identical_by_luck_do_not_mute_the_level_of_their_group():
    """Two in five steps here are the baseline's own, of two prompts all: the rest tells how loud rounding is."""
    loud = band_from(NullPair("tp size", TP4, TP1))

    def lucky(answer, theirs, all_of_it):
        both = enumerate(zip(answer.steps, theirs.steps, strict=True))
        steps = tuple(other if n and (all_of_it or n % 5 < 2) else step for n, (step, other) in both)
        return answer.model_copy(update={"steps": steps})

    mixed = [lucky(*pair, n < 2) for n, pair in enumerate(zip(TP1.answers, TP4.answers, strict=True))]
    band = band_from(NullPair("tp size", TP4, TP1.model_copy(update={"answers": tuple(mixed)})))
    assert 0.4 < band.sources[0].identical < 0.5 and band.sources[0].used
    assert band.decode.level == pytest.approx(loud.decode.level, abs=0.1)
    assert band.floor == pytest.approx(loud.floor, rel=0.1)
    means = {(row.prompt, row.bin): row.mean for row in band.decode.rows}
    wanted = {(row.prompt, row.bin): row.mean for row in loud.decode.rows}
    assert means.keys() == wanted.keys()  # steps are still paired with the null of their own prompt and positions
    assert all(abs(means[row] - wanted[row]) < 1 for row in means)


def test_too_few_steps_are_no_null():
    few = {"prompts": PROMPTS[:2]}
    with pytest.raises(ValueError, match="only 46 null steps"):
        band_from(NullPair("tp size", server(1e-5, 1, **few), server(1e-5, 2, **few)))


def test_standard_tp_that_is_broken_is_no_null():
    broken = server(1e-5, 2, fault=lambda prompt, kind, step, logits: -logits if step else logits)
    with pytest.raises(ValueError, match="standard TP differs from itself by"):
        band_from(NullPair("tp size", TP4, broken))


def test_what_chose_freely_counts_up_to_where_it_parts():
    free = server(1e-5, 2, forced=False)
    answer = free.answers[0]
    turned = answer.steps[5].model_copy(update={"token_id": (answer.steps[5].token_id + 1) % 64})
    parted = answer.model_copy(update={"steps": (*answer.steps[:5], turned, *answer.steps[6:])})
    band = band_from(NullPair("tp size", TP4, free.model_copy(update={"answers": (parted, *free.answers[1:])})))
    assert band.decode.n == 18 * 23 - 18  # steps 6 to 23 of that prompt stand behind another token


def test_prefill_that_is_identical_by_luck_does_not_narrow_its_band():
    same_first = server(1e-5, 2).answers
    mixed = tuple(
        answer.model_copy(update={"steps": (theirs.steps[0], *answer.steps[1:])})
        for answer, theirs in zip(same_first, TP4.answers, strict=True)
    )
    band = band_from(NullPair("tp size", TP4, TP1.model_copy(update={"answers": mixed})))
    assert band.prefill.change == band.decode.change


def test_a_band_is_saved_and_read_back(tmp_path):
    band = band_from(NullPair("tp size", TP4, TP1))
    band.save(tmp_path / "band.json")
    assert Band.load(tmp_path / "band.json") == band


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 1e-5, 1e-3), ("bfloat16", 0.1, 10)])
def test_shipped_bands_are_of_the_size_of_their_dtype(dtype, low, high):
    band = shipped(dtype, "recipe:llama-k4")
    assert band.decode.rows == () and band.workload_key == ""
    assert low < band.decode.change.bound(1e-3, 500) < high
    assert all(source.used for source in band.sources)


def test_kinds_of_models():
    assert kind_of("recipe:llama-k4") == "made" and kind_of("recipe:qwen3-retrieve-k4") == "retrieve"
    assert kind_of("nvidia/Llama-3.1-Nemotron-Nano-8B-v1") == "hub"
    assert measured_elsewhere("float8", "recipe:llama-k4") == (UNMEASURED, EXPONENTIAL)
    assert measured_elsewhere("float32", "recipe:llama-k4")[0].degrees > 5


def test_positions_and_places_by_hand():
    assert [position_bin(position) for position in (0, 15, 16, 63, 64, 1023, 1024)] == [0, 0, 1, 1, 2, 3, 4]
    assert [bin_ends(bin_) for bin_ in (0, 1, 2)] == [(0, 16), (16, 64), (64, 256)]
    assert bin_name(3) == "256-1023"
    assert [place_name(place) for place in (0, 1, 4, 5)] == [
        "alone", "batch places 1-4", "batch places 1-4", "batch places 5-8",
    ]  # fmt: skip


def test_a_shipped_band_is_wider_for_a_model_it_was_not_measured_with():
    known, other = shipped("float32", "recipe:llama-k4"), shipped("float32", "recipe:some-other")
    assert "4 times as wide for another model" in other.name and "times as wide" not in known.name
    for rate in (1e-2, 1e-5):
        assert other.decode.change.bound(rate, 500) == pytest.approx(4 * known.decode.change.bound(rate, 500))
    assert other.decode.level == pytest.approx(known.decode.level + math.log(4))
    assert other.decode.sd == known.decode.sd and other.spread == known.spread


def test_prompts_of_unlike_loudness_widen_an_unpaired_comparison():
    uneven = calibrate_uneven(loud=10.0)
    even = calibrate_uneven(loud=1.0)
    assert uneven.decode.between > 0.5 > 0.3 > even.decode.between
    assert uneven.decode.sd == pytest.approx(even.decode.sd, rel=0.2)  # within a row nothing changed


def calibrate_uneven(loud: float) -> Band:
    """A null whose `long` prompts are `loud` times as loud as the others."""

    def louder(prompt, kind, step, logits):
        noise = np.random.Generator(np.random.PCG64([step, ord(prompt[-1])])).standard_normal(logits.shape)
        return logits + loud * 1e-5 * noise if kind == "long" else logits

    return band_from(NullPair("tp size", TP4, server(1e-5, 2, fault=louder)))


def test_a_pair_with_a_wrong_server_is_listed_and_not_used():
    """Noise a thousand times as loud in one of two pairs: the band is that of the other pair alone."""
    wrong = server(1e-2, 4, cell="cpu/standard-tp/CPU_ATTN/made/tp2")
    band = band_from(NullPair("tp size", TP4, wrong), NullPair("tp size", TP4, TP1))
    assert [source.used for source in band.sources] == [False, True]
    assert "more than 10 times the" in band.sources[0].why and band.sources[1].why == ""
    assert band.decode == band_from(NullPair("tp size", TP4, TP1)).decode
    nine = band_from(NullPair("tp size", TP4, server(9e-5, 4)), NullPair("tp size", TP4, TP1))
    assert [source.used for source in nine.sources] == [True, True]  # sqrt(1 + 81) / sqrt(2) = 6.4 times as loud


def test_one_pair_alone_is_held_to_its_dtype():
    """fp32 rounds at 1.2e-7: 4,096 roundings are 4.9e-4 nat. bf16 rounds 65,536 times as coarsely."""
    loud = {"noise": 1e-2}
    with pytest.raises(ValueError, match="roundings of float32 where 4,096 is the most"):
        band_from(NullPair("tp size", TP4, server(seed=4, **loud)))
    coarse = [server(seed=seed, dtype="bfloat16", **loud) for seed in (4, 5)]
    assert band_from(NullPair("tp size", *coarse)).decode.change.threshold > 1e-2

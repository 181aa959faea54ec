"""Packed transcripts: what goes in comes out, numbers that are none included; few lie unpacked."""

import math

import pytest
from test_runner import BASE, HELIX, transcript

from harness.references import References
from harness.transcript import Step


def test_a_transcript_comes_out_as_it_went_in():
    held = References()
    held["a"] = transcript(BASE)
    assert held["a"] == transcript(BASE) and held.get("a").digest() == transcript(BASE).digest()
    assert "a" in held and held.there("a") and held.get("b") is None and "b" not in held
    with pytest.raises(KeyError):
        held["b"]


def test_a_baseline_that_failed_is_known_and_gives_nothing():
    held = References()
    held["a"] = None
    assert "a" in held and not held.there("a") and held.get("a") is None


def test_the_last_one_counts_and_many_are_told_apart():
    held = References()
    for number in range(9):
        held[str(number)] = transcript(BASE, shift=number)
    held["0"] = transcript(HELIX)
    assert held["0"] == transcript(HELIX) and [held[str(number)] for number in range(1, 9)] == [
        transcript(BASE, shift=number) for number in range(1, 9)
    ]


def test_numbers_that_are_none_and_exact_ones_survive():
    step = Step(token_id=1, logprob=-0.1 - 2**-40, top={1: -0.1 - 2**-40, 2: math.nan, 3: -math.inf})
    answer = transcript(BASE).answers[0].model_copy(update={"steps": (step,)})
    held = References()
    held["a"] = transcript(BASE).model_copy(update={"answers": (answer,)})
    found = held["a"].answers[0].steps[0]
    assert found.logprob == step.logprob and math.isnan(found.top[2]) and found.top[3] == -math.inf

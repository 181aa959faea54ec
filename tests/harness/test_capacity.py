"""KV capacity against what the layout promises, by hand."""

import pytest

from harness.capacity import capacity, promised
from harness.cell import Cell, Mode


def cell(model: str, tp: int, kvp: int, mode: Mode = Mode.HELIX_GQA, backend: str = "HELIX_CPU") -> Cell:
    return Cell(mode=mode, backend=backend, hardware="cpu", model=model, tp=tp, kvp=kvp)


@pytest.mark.parametrize(
    ("made", "factor"),
    [
        (cell("recipe:llama-k4", 4, 2), 1),  # TP = K: nothing was duplicated, nothing is won
        (cell("recipe:llama-k4", 8, 4), 2),  # TP / K = 2
        (cell("recipe:llama-k2", 4, 2, Mode.STANDARD_DCP), 2),
        (cell("recipe:deepseek-v2", 4, 4, Mode.HELIX_MLA, "HELIX_CPU_MLA"), 4),  # KVP
        (cell("recipe:deepseek-v2", 4, 2, Mode.STANDARD_DCP, "HELIX_CPU_MLA"), 2),
    ],
)
def test_promised_factor(made, factor):
    assert promised(made) == factor


@pytest.mark.parametrize(
    ("made", "factor"),
    [
        (cell("recipe:llama-k6", 6, 3), 2),  # 3 heads over 3 shards are one a rank; on 3 ranks two
        (cell("recipe:llama-k3", 6, 2), 2),  # 1 head over 2 shards; on 3 ranks one whole
        (cell("recipe:llama-k6", 4, 2), 4 / 3),  # 3 heads over 2 shards; on 3 ranks two
    ],
)
def test_a_baseline_on_three_ranks_holds_more_heads_each(made, factor):
    assert promised(made, baseline_tp=3) == pytest.approx(factor)


def test_a_kept_promise_is_within_the_bound_and_says_its_numbers():
    found = capacity(cell("recipe:llama-k4", 8, 4), tokens=174_000, baseline_tokens=87_360)
    assert found.value == pytest.approx(1 - 174_000 / (2 * 87_360)) and found.value < found.bound == 0.02
    assert "174000 tokens" in found.note and "promises 2" in found.note


def test_a_broken_promise_is_beyond_it():
    found = capacity(cell("recipe:llama-k4", 8, 4), tokens=87_360, baseline_tokens=87_360)
    assert found.value == 0.5 > found.bound


def test_nothing_is_said_where_nothing_was_measured():
    assert capacity(cell("recipe:llama-k4", 8, 4), None, 87_360) is None
    assert capacity(cell("recipe:llama-k4", 8, 4), 87_360, None) is None
    assert capacity(cell("some-org/some-model", 8, 4), 87_360, 87_360) is None  # planned, its layout is not known

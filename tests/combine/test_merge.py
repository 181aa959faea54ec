"""The merge of partials: hand-computed values, empty and broken partials, exactness, and properties against fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_runtime.attention import dense_attention_fp64
from helix_runtime.combine import merge_partials
from helix_runtime.combine.merge import scale_partial

INF, NAN = float("inf"), float("nan")


def column(*numbers, dtype=torch.float32):
    """Numbers, one a partial, as lses [N, 1, 1]; `[..., None]` makes outputs [N, 1, 1, 1] of them."""
    return torch.tensor(numbers, dtype=dtype).view(-1, 1, 1)


def merge(outputs, lses, **options):
    output, lse = merge_partials(column(*outputs)[..., None], column(*lses), **options)
    return output.item(), lse.item()


def test_hand_computed():
    # Sums of exponentials 1 and 3: the weights are 1/4 and 3/4.
    assert merge([10.0, 2.0], [0.0, math.log(3)]) == pytest.approx((4.0, math.log(4)))
    # Base 2 in, natural out.
    assert merge([10.0, 2.0], [0.0, math.log2(3)], base="2") == pytest.approx((4.0, math.log(4)))
    # Read in the wrong base, the same numbers give another answer: 3 becomes exp(log2(3)).
    wrong = math.exp(math.log2(3))
    assert merge([10.0, 2.0], [0.0, math.log2(3)]) == pytest.approx(
        ((10 + 2 * wrong) / (1 + wrong), math.log(1 + wrong))
    )
    assert merge([1.0, 2.0, 6.0], [5.0] * 3) == pytest.approx((3.0, 5 + math.log(3)))


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("garbage", [0.0, 1e30, INF, NAN])
def test_an_empty_partial_has_no_part_whatever_its_output_holds(garbage, base):
    expected = merge([10.0, 2.0], [0.0, 1.0], base=base)
    assert merge([10.0, garbage, 2.0], [0.0, -INF, 1.0], base=base) == expected
    assert merge([garbage, 10.0, 2.0, garbage], [-INF, 0.0, 1.0, -INF], base=base) == expected
    assert merge([garbage], [-INF], base=base) == (0.0, -INF)
    assert merge([garbage, garbage], [-INF, -INF], base=base) == (0.0, -INF)


@pytest.mark.parametrize("broken", [NAN, INF])
def test_an_lse_that_no_attention_has_is_loud(broken):
    for lses in ([0.0, broken], [broken, 0.0], [broken, -INF], [broken, broken]):
        output, lse = merge([10.0, 2.0], lses)
        assert math.isnan(output) and math.isnan(lse)
    assert math.isnan(merge([10.0], [broken])[0])


def test_nan_in_the_output_of_a_partial_that_is_not_empty_is_loud():
    assert math.isnan(merge([NAN, 2.0], [0.0, 1.0])[0])
    assert math.isnan(merge([NAN, 2.0], [-1e4, 1.0])[0]), "also where the weight underflows to 0"


def test_broken_and_empty_rows_leave_other_rows_alone():
    lses = torch.tensor([[[0.0, -INF, NAN]], [[math.log(3), -INF, 0.0]]])
    outputs = torch.tensor([[[10.0, NAN, 5.0]], [[2.0, 7.0, 5.0]]])[..., None]
    output, lse = merge_partials(outputs, lses)
    assert output.flatten().tolist()[:2] == pytest.approx([4.0, 0.0])
    assert lse.flatten().tolist()[:2] == pytest.approx([math.log(4), -INF])
    assert output[0, 2].isnan().all() and lse[0, 2].isnan()


@pytest.mark.parametrize("level", [-1e4, -200.0, 200.0, 1e4])
def test_large_lses_neither_overflow_nor_underflow(level):
    output, lse = merge([10.0, 2.0], [level, level + math.log(3)])
    assert output == pytest.approx(4.0, abs=5e-3) and lse == pytest.approx(level + math.log(4), rel=1e-6)
    assert merge([10.0, 2.0], [level, level - 500.0])[0] == 10.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_partial_comes_back_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 5, 3, 7, generator=generator).to(dtype)
    lses = 10 * torch.randn(1, 5, 3, generator=generator)
    output, lse = merge_partials(outputs, lses)
    assert torch.equal(output, outputs[0]) and output.dtype == dtype
    assert torch.equal(lse.float(), lses[0])
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_bits_repeat_and_do_not_depend_on_strides():
    generator = torch.Generator().manual_seed(1)
    outputs, lses = torch.randn(8, 6, 4, 64, generator=generator), 3 * torch.randn(8, 6, 4, generator=generator)
    first = merge_partials(outputs, lses)
    strided = outputs.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for again in (merge_partials(outputs, lses), merge_partials(strided, lses)):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    kept = outputs.clone(), lses.clone()
    assert torch.equal(outputs, kept[0]) and torch.equal(lses, kept[1]), "the inputs are left alone"
    rows = merge_partials(outputs[:, 2:3], lses[:, 2:3])
    assert torch.equal(rows[0], first[0][2:3]), "a row does not depend on the batch around it"


def test_base_2_is_converted_before_it_is_rounded():
    lses = column(100.3, 99.7)  # fp32, exact in fp64
    output, lse = merge_partials(column(10.0, 2.0, dtype=torch.float64)[..., None], lses, base="2")
    first, second = (2.0**x for x in lses.flatten().tolist())
    assert output.item() == pytest.approx((10 * first + 2 * second) / (first + second), rel=1e-13)
    assert lse.item() == pytest.approx(math.log(first + second), rel=1e-14)


def test_no_rows():
    output, lse = merge_partials(torch.zeros(4, 0, 2, 8), torch.zeros(4, 0, 2))
    assert output.shape == (0, 2, 8) and lse.shape == (0, 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"outputs \(2, 3, 4, 5\) and lses \(2, 3\)"):
        merge_partials(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"outputs \(0, 3, 4, 5\)"):
        merge_partials(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 4))
    with pytest.raises(ValueError, match="lse base '10'"):
        merge_partials(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), base="10")
    with pytest.raises(ValueError, match=r"lse is torch\.bfloat16"):
        merge_partials(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bfloat16))


@st.composite
def split_attentions(draw):
    """One query's keys and values [S], and into which shards they are cut: sizes of 0 and 1 included."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 5, 40]), min_size=1, max_size=8).filter(any))
    return sizes, draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 64])), draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(split=split_attentions(), base=st.sampled_from(["e", "2"]), spread=st.sampled_from([0.1, 1.0, 30.0]))
def test_any_split_of_the_keys_merges_to_the_whole(split, base, spread):
    sizes, heads, dim, seed = split
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(3, heads, dim, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, sum(sizes), heads, dim, generator=generator, dtype=torch.float64)
    options = {"scale": dim**-0.5, "causal": False}
    expected, expected_lse = dense_attention_fp64(query, keys, values, **options)

    outputs, lses = [], []
    for key, value in zip(keys.split(sizes), values.split(sizes), strict=True):
        if len(key):
            output, lse = dense_attention_fp64(query, key, value, **options)
        else:
            output, lse = torch.full_like(query, NAN), query.new_full((3, heads), -INF)
        outputs.append(output)
        lses.append(lse / math.log(2) if base == "2" else lse)
    outputs, lses = torch.stack(outputs), torch.stack(lses)

    output, lse = merge_partials(outputs, lses, base)
    torch.testing.assert_close(output, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(lse, expected_lse, atol=1e-11, rtol=1e-11)
    # In fp32 the lse itself is rounded: its error scales a weight, by about |lse| * 2^-24 (twice that in base 2).
    output, lse = merge_partials(outputs.float(), lses.float(), base)
    error = 1e-6 * (2 + float(lses[lses.isfinite()].abs().max())) * float(values.abs().max())
    torch.testing.assert_close(output.double(), expected, atol=error, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**31), st.floats(0, 1))
def test_merging_in_two_steps_is_merging_at_once(members, cut, seed, empty):
    cut = min(cut, members - 1)
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(members, 4, 3, 5, generator=generator, dtype=torch.float64)
    lses = torch.randn(members, 4, 3, generator=generator, dtype=torch.float64)
    lses[torch.rand(lses.shape, generator=generator) < empty] = -INF
    halves = [merge_partials(outputs[part], lses[part]) for part in (slice(cut), slice(cut, None))]
    twice = merge_partials(*(torch.stack(parts) for parts in zip(*halves, strict=True)))
    for one, other in zip(merge_partials(outputs, lses), twice, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("height", [0.0, 12.0, 431.0, -2000.0])
def test_the_shares_of_ag_rs_sum_to_the_merge_however_large_the_lses_are(height):
    """A weight of exp(lse - merged lse) would be off by the rounding of an LSE of 431: 1.5e-5, for every head."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(4, 50, 8, 16, generator=generator)
    lses = height + 3 * torch.randn(4, 50, 8, generator=generator)
    lses[2, :7] = -INF
    shares = [scale_partial(outputs[rank], lses, rank) for rank in range(4)]
    found, found_lse = sum(share for share, _ in shares), shares[0][1]
    expected, expected_lse = merge_partials(outputs.double(), lses.double())
    assert (found - expected).norm() <= 3e-7 * expected.norm()
    torch.testing.assert_close(found_lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", [NAN, INF])
def test_shares_of_a_broken_lse_are_loud_and_of_empty_shards_nothing(broken):
    ones = torch.ones(1, 1, 1)
    share, lse = scale_partial(ones, column(0.0, broken), 0)
    assert share.isnan().all() and lse.isnan().all()
    share, lse = scale_partial(NAN * ones, column(-INF, -INF), 1)
    assert (share == 0).all() and (lse == -INF).all()

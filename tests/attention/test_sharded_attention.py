"""Property: attention is the merge of the partials of all shards, for random batches and layouts, against fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_shards import Batch

from helix_runtime.attention import ReferenceAttention
from helix_runtime.combine import merge_partials
from helix_runtime.sharding import global_positions, local_lengths


@st.composite
def layouts(draw):
    """(kvp, interleave, block size), the interleave dividing the block size."""
    interleave = draw(st.sampled_from([1, 2, 3, 4, 16]))
    return draw(st.sampled_from([1, 2, 3, 4, 8])), interleave, interleave * draw(st.integers(1, 3))


@st.composite
def batches(draw, dtype):
    """Prefill (new = length), later chunks and prefix hits (1 < new < length), decode (new = 1), and mixes of them."""
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    decode = draw(st.booleans())
    new = [1 if decode else draw(st.integers(1, length)) for length in lengths]
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    return Batch.random(draw(st.integers(0, 2**31)), lengths, new, heads, kv_heads, draw(st.integers(1, 9)), dtype)


def partials(batch, layout, **options):
    kvp, interleave, block_size = layout
    parts = [
        ReferenceAttention(kvp, rank, interleave, batch.scale, **options).partial(
            batch.query,
            batch.kv_cache(kvp, rank, interleave, block_size),
            batch.block_table(kvp, block_size),
            local_lengths(batch.seq_lens, kvp, rank, interleave),
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
        )
        for rank in range(kvp)
    ]
    outputs, lses = zip(*parts, strict=True)
    return torch.stack(outputs), torch.stack(lses)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(batch=batches(torch.float32), layout=layouts(), softcap=st.sampled_from([None, 2.0]))
def test_merged_shards_are_the_whole_in_fp32(batch, layout, softcap):
    output, lse = merge_partials(*partials(batch, layout, softcap=softcap))
    expected, expected_lse = batch.dense(softcap=softcap)
    torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=batches(torch.float64), layout=layouts())
def test_merged_shards_are_the_whole_to_fp64_rounding(batch, layout):
    output, lse = merge_partials(*partials(batch, layout))
    expected, expected_lse = batch.dense()
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=batches(torch.float64), layout=layouts(), data=st.data())
def test_a_partial_is_attention_over_the_tokens_that_its_rank_owns(batch, layout, data):
    kvp, interleave, _ = layout
    rank = data.draw(st.integers(0, kvp - 1))
    outputs, lses = partials(batch, layout)
    row = 0
    for length, new, keys, values in zip(batch.lengths, batch.new, batch.keys, batch.values, strict=True):
        owned = [p for p in range(length) if p // interleave % kvp == rank]
        for position in range(length - new, length):
            visible = [p for p in owned if p <= position]
            assert torch.equal(
                torch.tensor(visible, dtype=torch.int64),
                global_positions(len(visible), kvp=kvp, kvp_rank=rank, interleave=interleave),
            )
            if not visible:
                assert (outputs[rank, row] == 0).all() and (lses[rank, row] == float("-inf")).all()
            else:
                one = Batch(
                    (len(visible),), (1,), batch.query[row : row + 1], (keys[visible],), (values[visible],), batch.scale
                )
                expected, expected_lse = one.dense()
                torch.testing.assert_close(outputs[rank, row], expected[0], atol=1e-12, rtol=1e-12)
                torch.testing.assert_close(lses[rank, row], expected_lse[0], atol=1e-12, rtol=1e-12)
            row += 1

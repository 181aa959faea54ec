"""Partial attention over paged shards: hand-computed values, edges, dtypes, layouts."""

import math
import subprocess
import sys

import pytest
import torch
from paged_shards import Batch

from helix_runtime.attention import (
    PartialAttention,
    ReferenceAttention,
    dense_attention_fp64,
    paged,
    paged_partial_attention,
    reference,
    split_cpu_kv_cache,
)

INF = float("inf")


def partial(batch, kvp=1, rank=0, interleave=1, block_size=4, **options):
    keys, values = split_cpu_kv_cache(batch.kv_cache(kvp, rank, interleave, block_size))
    return paged_partial_attention(
        batch.query,
        keys,
        values,
        batch.block_table(kvp, block_size),
        batch.query_start_loc,
        batch.seq_lens,
        kvp=kvp,
        kvp_rank=rank,
        interleave=interleave,
        scale=batch.scale,
        **options,
    )


def by_hand(keys, values, new=1):
    """One head of size 1, query 1, scale 1: the scores are the keys."""
    column = [torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (keys, values)]
    return Batch((len(keys),), (new,), torch.ones(new, 1, 1), (column[0],), (column[1],), 1.0)


def test_hand_computed_decode_and_its_two_shards():
    batch = by_hand([0.0, math.log(3)], [10.0, 2.0])  # weights 1 and 3
    output, lse = partial(batch)
    assert output.item() == pytest.approx((1 * 10 + 3 * 2) / 4)
    assert lse.item() == pytest.approx(math.log(4))
    assert [part.item() for part in partial(batch, kvp=2, rank=0)] == pytest.approx([10.0, 0.0])
    assert [part.item() for part in partial(batch, kvp=2, rank=1)] == pytest.approx([2.0, math.log(3)])


def test_hand_computed_prefill_sees_global_positions_up_to_its_own():
    # Equal scores: the output is the mean of the visible values, exp(lse) their number. Rank 1 owns positions 1, 3.
    batch = by_hand([0.0] * 4, [1.0, 2.0, 4.0, 8.0], new=4)
    output, lse = partial(batch, kvp=2, rank=1)
    assert output.flatten().tolist() == pytest.approx([0.0, 2.0, 2.0, 5.0])
    assert lse.exp().flatten().tolist() == pytest.approx([0.0, 1.0, 1.0, 2.0])
    # The second chunk alone gives the same rows as the whole prefill.
    chunk = by_hand([0.0] * 4, [1.0, 2.0, 4.0, 8.0], new=2)
    assert torch.equal(partial(chunk, kvp=2, rank=1)[0], output[2:])


def test_hand_computed_softcap_and_no_causal_mask():
    batch = by_hand([0.0, 2.0], [0.0, 1.0], new=2)
    weight = math.exp(1.5 * math.tanh(2 / 1.5))
    output, lse = partial(batch, softcap=1.5, causal=False)
    assert output.flatten().tolist() == pytest.approx([weight / (1 + weight)] * 2)
    assert lse.flatten().tolist() == pytest.approx([math.log(1 + weight)] * 2)
    assert partial(batch, softcap=1.5)[0].flatten().tolist() == pytest.approx([0.0, weight / (1 + weight)])


def test_the_fp64_reference_equals_torch():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(n, h, 8, generator=generator, dtype=torch.float64) for n, h in ((5, 4), (9, 2), (9, 2))
    )
    mask = torch.ones(5, 9, dtype=torch.bool).tril(diagonal=4)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), mask, scale=0.3, enable_gqa=True
    )
    output, lse = dense_attention_fp64(query, key, value, scale=0.3)
    torch.testing.assert_close(output, theirs.transpose(0, 1))
    scores = 0.3 * (key[:, 1] @ query[0, 3])  # query head 3 reads KV head 1; the first query sees keys 0..4
    assert lse[0, 3].item() == pytest.approx(scores[:5].exp().sum().log().item())


@pytest.mark.parametrize("interleave", [1, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_empty_shards_give_zero_and_minus_infinity(interleave, new):
    length = 2 * interleave + (new if interleave > 1 else 1)  # ranks 0 and 1 are full, rank 2 begins, rank 3 is empty
    batch = Batch.random(0, [length], [min(new, length)])
    output, lse = partial(batch, kvp=4, rank=3, interleave=interleave)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -INF))
    assert torch.isfinite(partial(batch, kvp=4, rank=0, interleave=interleave)[1]).all()


def test_padding_rows_and_requests_without_new_tokens():
    batch = Batch.random(1, [6, 5, 3], [2, 0, 1])
    expected, expected_lse = batch.dense()
    padded = Batch(**{**vars(batch), "query": torch.cat([batch.query, torch.full((2, 4, 8), float("nan"))])})
    output, lse = partial(padded)
    torch.testing.assert_close(output[:3].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:3].double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(output[3:], torch.zeros(2, 4, 8)) and torch.equal(lse[3:], torch.full((2, 4), -INF))
    nothing = Batch.random(1, [6], [0])
    assert [tuple(part.shape) for part in partial(nothing)] == [(0, 4, 8), (0, 4)]


@pytest.mark.parametrize(
    ("dtype", "lse_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float16, torch.float32, 2e-3),
        (torch.float64, torch.float64, 1e-13),
    ],
)
def test_dtypes(dtype, lse_dtype, tolerance):
    batch = Batch.random(2, [9, 4], [3, 1], dtype=dtype)
    output, lse = partial(batch)
    assert (output.dtype, lse.dtype) == (dtype, lse_dtype)
    expected, expected_lse = batch.dense()
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    # The inputs are exact, so the lse is as exact as its accumulation, also for bf16.
    torch.testing.assert_close(lse.double(), expected_lse, atol=min(tolerance, 1e-5), rtol=1e-6)


def test_fp64_accumulation_on_request_is_closer():
    batch = Batch.random(3, [400], [1], dim=64)
    expected = batch.dense()[1]
    assert (partial(batch, accumulate=torch.float64)[1] - expected).abs().max() <= 1e-6
    assert partial(batch, accumulate=torch.float64)[1].dtype == torch.float32


def test_long_prefill_in_bounded_pieces_is_the_same(monkeypatch):
    batch = Batch.random(4, [37, 20], [30, 20])
    whole = partial(batch, kvp=2, rank=1, interleave=2)
    monkeypatch.setattr(reference, "SCORE_BYTES", 4 * 4 * 20 * 3)  # three or so queries at a time
    pieces = partial(batch, kvp=2, rank=1, interleave=2)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_batched_decode_is_the_loop(monkeypatch):
    batch = Batch.random(5, [1, 2, 9, 33, 16], [1] * 5)
    for rank in range(3):
        batched = partial(batch, kvp=3, rank=rank, interleave=2)
        with monkeypatch.context() as context:
            context.setattr(paged, "DECODE_BATCH_BYTES", 0)
            looped = partial(batch, kvp=3, rank=rank, interleave=2)
        for one, other in zip(batched, looped, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_too_long_a_local_length_reads_nothing_and_too_short_a_one_is_obeyed():
    batch = Batch.random(6, [9, 5], [1, 1])
    right = partial(batch, kvp=2)
    longer = partial(batch, kvp=2, local_seq_lens=torch.tensor([6, 4]))
    assert all(torch.equal(one, other) for one, other in zip(right, longer, strict=True))
    shorter = partial(batch, kvp=2, local_seq_lens=torch.tensor([4, 3]))
    assert (shorter[1][0] < right[1][0]).all() and torch.equal(shorter[1][1], right[1][1])


@pytest.mark.parametrize("new", [[1, 1], [3, 1]])
def test_mla_values_are_a_view_of_the_latent_keys(new):
    # A latent of 576, of which the first 512 are the value; one KV head, 4 query heads.
    generator = torch.Generator().manual_seed(8)
    latents = torch.randn(6, 4, 576, generator=generator)
    query = torch.randn(sum(new), 4, 576, generator=generator)
    table, lengths = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32), torch.tensor([7, 4])
    ends = torch.tensor([0, *new]).cumsum(0)
    attention = ReferenceAttention(kvp=1, kvp_rank=0, interleave=1, scale=0.04, latent_value_dim=512)
    output, lse = attention.partial(query, latents, table, lengths, query_start_loc=ends, seq_lens=lengths)
    assert output.shape == (sum(new), 4, 512)
    for request, length in enumerate(lengths.tolist()):
        key = latents[table[request].long()].flatten(0, 1)[:length, None]
        rows = slice(ends[request], ends[request + 1])
        expected, expected_lse = dense_attention_fp64(query[rows], key, key[..., :512], scale=0.04)
        torch.testing.assert_close(output[rows].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[rows].double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_values_of_another_width_in_a_cache_of_their_own():
    generator = torch.Generator().manual_seed(9)
    keys, values = torch.randn(3, 2, 4, 6, generator=generator), torch.randn(3, 2, 4, 10, generator=generator)
    query = torch.randn(2, 4, 6, generator=generator)
    table, ends, lengths = torch.tensor([[2, 0]]), torch.tensor([0, 2]), torch.tensor([7])
    output, _ = paged_partial_attention(query, keys, values, table, ends, lengths, kvp=1, kvp_rank=0, scale=0.5)
    dense = [cache[table[0]].transpose(1, 2).flatten(0, 1)[:7] for cache in (keys, values)]
    torch.testing.assert_close(output.double(), dense_attention_fp64(query, *dense, scale=0.5)[0], atol=1e-5, rtol=1e-5)


def test_the_cache_is_never_copied_whole():
    # A cache of 4 PiB, one number expanded: only the blocks of the request can have been read.
    cache = torch.ones(()).expand(2**40, 2, 16, 32)
    table = torch.tensor([[2**31 - 1, 5]], dtype=torch.int32)
    output, lse = paged_partial_attention(
        torch.ones(1, 2, 32),
        cache,
        cache,
        table,
        torch.tensor([0, 1]),
        torch.tensor([20]),
        kvp=1,
        kvp_rank=0,
        scale=1.0,
    )
    assert torch.equal(output, torch.ones(1, 2, 32))
    assert lse.flatten().tolist() == pytest.approx([32 + math.log(20)] * 2)


def test_the_interface_is_the_function_on_the_cpu_layout():
    batch = Batch.random(10, [9, 4], [3, 1])
    attention: PartialAttention = ReferenceAttention(kvp=2, kvp_rank=1, interleave=2, scale=batch.scale, softcap=3.0)
    found = attention.partial(
        batch.query,
        batch.kv_cache(2, 1, 2, 4),
        batch.block_table(2, 4),
        torch.tensor([4, 2]),
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
    )
    expected = partial(batch, kvp=2, rank=1, interleave=2, softcap=3.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        partial(Batch.random(0, [4], [1], heads=3))
    batch = Batch.random(0, [2], [2])
    first = batch.keys[0][:1]
    with pytest.raises(ValueError, match="request 0 has 2 new tokens, but a length of 1"):
        partial(Batch(**{**vars(batch), "new": (2,), "lengths": (1,), "keys": (first,), "values": (first,)}))
    keys, values = split_cpu_kv_cache(torch.zeros(2, 2, 4, 16))
    with pytest.raises(ValueError, match="5 local tokens need 2 blocks of 4, the block table has 1"):
        paged_partial_attention(
            torch.zeros(1, 4, 8), keys, values, torch.tensor([[1]]), torch.tensor([0, 1]), torch.tensor([5]),
            kvp=1, kvp_rank=0, scale=1.0,
        )  # fmt: skip


def test_attention_and_combine_import_without_vllm():
    program = """
import sys
sys.modules["vllm"] = None  # importing vLLM now fails
import helix_runtime.attention, helix_runtime.combine, helix_runtime.sharding
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

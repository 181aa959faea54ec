"""The message of the All-to-All: what goes to whom, bit for bit, in every dtype and for awkward sizes. No processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_runtime.combine import (
    COMBINES,
    Message,
    all_gather_reduce_scatter_combine,
    all_to_all_combine,
    merge_partials,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_partial(seed, tokens, heads, dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    lse = 30 * torch.randn(tokens, heads, generator=generator)
    lse[torch.rand(tokens, heads, generator=generator) < 0.2] = -float("inf")
    return output, lse


def test_the_row_of_member_i_is_head_chunk_i():
    output = torch.arange(2 * 4 * 1).view(2, 4, 1).to(torch.bfloat16)  # token t, head h: 4 t + h
    lse = 100.0 + torch.arange(8).view(2, 4)
    message = Message(tokens=2, heads=2, head_dim=1, dtype=torch.bfloat16)
    # 4 lse of 4 bytes, 4 outputs of 2 bytes: 24, rounded up to 32.
    assert (message.lse_bytes, message.used_bytes, message.bytes) == (16, 24, 32)
    packed = message.pack(output, lse)
    assert packed.shape == (2, 32)
    assert packed[1, :16].view(torch.float32).tolist() == [102.0, 103.0, 106.0, 107.0]
    assert packed[1, 16:24].view(torch.bfloat16).tolist() == [2.0, 3.0, 6.0, 7.0]
    assert packed[:, 24:].eq(0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    members=st.sampled_from([1, 2, 3, 4, 8]),
    tokens=st.integers(0, 5),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 5, 8, 63, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_an_exchange_by_hand_delivers_every_bit_and_merges(members, tokens, heads, dim, dtype, seed):
    partials = [random_partial(seed + rank, tokens, members * heads, dim, dtype) for rank in range(members)]
    message = Message(tokens, heads, dim, dtype)
    sent = [message.pack(*partial) for partial in partials]
    assert all(packed.shape == (members, message.bytes) for packed in sent)
    for rank in range(members):
        mine = slice(rank * heads, (rank + 1) * heads)
        outputs, lses = message.unpack(torch.stack([packed[rank] for packed in sent]))
        expected = torch.stack([output[:, mine] for output, _ in partials])
        expected_lses = torch.stack([lse[:, mine] for _, lse in partials])
        assert torch.equal(outputs, expected) and outputs.dtype == dtype
        assert torch.equal(lses.float(), expected_lses)
        merged = merge_partials(outputs, lses)
        assert all(torch.equal(a, b) for a, b in zip(merged, merge_partials(expected, expected_lses), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_lse_keeps_all_its_bits_beside_a_narrow_output(dtype):
    lse = torch.tensor([[1.00000011920929, -3.4028234663852886e38, -float("inf"), 1e-45]])  # fp32 neighbours and edges
    message = Message(1, 2, 3, dtype)
    _, lses = message.unpack(message.pack(torch.zeros(1, 4, 3, dtype=dtype), lse))
    assert torch.equal(lses.flatten().float(), lse.flatten())


def test_strided_inputs_pack_alike():
    output, lse = random_partial(0, 3, 4, 5, torch.float16)
    message = Message(3, 2, 5, torch.float16)
    strided = output.permute(2, 0, 1).contiguous().permute(1, 2, 0), lse.T.contiguous().T
    assert not strided[0].is_contiguous()
    assert torch.equal(message.pack(*strided), message.pack(output, lse))


def test_the_combines_go_by_vllms_names():
    assert COMBINES["a2a"] is all_to_all_combine
    assert COMBINES["ag_rs"] is all_gather_reduce_scatter_combine

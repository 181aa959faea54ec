"""The Triton kernels against hand-computed values and `merge_partials`: on a GPU where there is one, else interpreted.

Triton's interpreter runs the same kernel source over numpy, so CI without a GPU checks all but the compiler.
"""

import importlib
import itertools
import math
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before the import below
pytest.importorskip("triton", reason="the combine kernels need Triton; not installed")

from helix_runtime.combine import device_code, kernels  # noqa: E402
from helix_runtime.combine.merge import merge_partials  # noqa: E402
from helix_runtime.combine.workspace import PackedLayout, Workspace  # noqa: E402

if not GPU:
    importlib.reload(device_code)  # another test may have imported it for compilation
    kernels = importlib.reload(kernels)

DEVICE = "cuda" if GPU else "cpu"
INF = float("inf")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")


def partials(ranks, batch, heads, head_dim, dtype=torch.float32, seed=0, empty=0.2):
    """Random outputs [N, B, H, D] and lses [N, B, H] in which a share of the partials is empty and full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(ranks, batch, heads, head_dim, generator=generator)
    lses = 4 * torch.randn(ranks, batch, heads, generator=generator)
    gone = torch.rand(ranks, batch, heads, generator=generator) < empty
    outputs[gone], lses[gone] = math.nan, -INF
    return outputs.to(DEVICE, dtype), lses.to(DEVICE)


def packed(partial_output, partial_lse, ranks, **mask):
    """Views (outputs, lses) of a poisoned send buffer after pack."""
    layout = PackedLayout.of(partial_output, ranks)
    send = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8, device=DEVICE)
    outputs, lses = layout.outputs(send), layout.lses(send)
    kernels.pack(partial_output, partial_lse, outputs, lses, **mask)
    return outputs, lses


def by_destination(tensor, ranks):
    """[B, N * H, ...] -> [N, B, H, ...]."""
    return tensor.unflatten(1, (ranks, -1)).transpose(0, 1)


def reference(outputs, lses, base="e"):
    """fp64 merge, written out: softmax over ranks of the live lses."""
    outputs, lses = outputs.double(), lses.double() * (math.log(2) if base == "2" else 1.0)
    weights = torch.softmax(lses, 0).nan_to_num(0.0).unsqueeze(-1)
    outputs = torch.where(weights == 0, 0.0, outputs)
    return (outputs * weights).sum(0), torch.logsumexp(lses, 0)


def test_two_equal_partials_give_their_mean_and_ln2_more():
    outputs = torch.stack([torch.full((1, 1, 64), 1.0), torch.full((1, 1, 64), 4.0)]).to(DEVICE)
    output, lse = kernels.combine(outputs, torch.tensor([5.0, 5.0], device=DEVICE).view(2, 1, 1))
    assert output.tolist() == [[[2.5] * 64]]
    assert lse.item() == pytest.approx(5.0 + math.log(2.0), abs=1e-6)


def test_base_2_weighs_by_powers_of_two_and_returns_a_natural_log():
    outputs = torch.stack([torch.full((1, 1, 64), 4.0), torch.full((1, 1, 64), 8.0)]).to(DEVICE)
    lses = torch.tensor([3.0, 1.0], device=DEVICE).view(2, 1, 1)  # weights 8 : 2
    output, lse = kernels.combine(outputs, lses, "2")
    torch.testing.assert_close(output, torch.full((1, 1, 64), 4.8, device=DEVICE))
    assert lse.item() == pytest.approx(math.log(10.0), abs=1e-6)


def test_an_empty_partial_does_not_leak_and_a_row_of_them_is_zero():
    outputs = torch.full((3, 2, 1, 64), math.nan, device=DEVICE)
    lses = torch.full((3, 2, 1), -INF, device=DEVICE)
    outputs[1, 0], lses[1, 0] = 7.0, -300.0
    output, lse = kernels.combine(outputs, lses)
    assert output[0].tolist() == [[7.0] * 64] and lse[0].item() == -300.0
    assert output[1].tolist() == [[0.0] * 64] and lse[1].item() == -INF


@pytest.mark.parametrize("broken", [math.nan, INF])
def test_a_broken_lse_is_not_made_plausible(broken):
    outputs, lses = partials(4, 2, 1, 64, empty=0)
    lses[2, 0, 0] = broken
    output, lse = kernels.combine(outputs, lses)
    assert output[0].isnan().all() and lse[0].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12, 64])
@pytest.mark.parametrize("base", ["e", "2"])
def test_combine_is_merge_partials(ranks, base):
    outputs, lses = partials(ranks, 3, 2, 64, seed=ranks, empty=0.4)
    output, lse = kernels.combine(outputs, lses, base)
    expected, expected_lse = merge_partials(outputs, lses, base)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 112, 128, 192, 256, 512, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_exchange_reads_back_as_the_exact_merge(dtype, head_dim):
    ranks, batch, heads = 4, 5, 3
    outputs, lses = partials(ranks, batch, heads, head_dim, dtype, seed=head_dim)
    send_outputs, send_lses = packed(outputs.transpose(0, 1).flatten(1, 2), lses.transpose(0, 1).flatten(1, 2), ranks)
    assert torch.equal(send_lses, lses)
    assert torch.equal(send_outputs, outputs.masked_fill((lses == -INF).unsqueeze(-1), 0.0))
    output, lse = kernels.combine(send_outputs, send_lses)
    exact, exact_lse = reference(outputs, lses)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    error = (output.double() - exact).norm() / exact.norm()
    ideal = (exact.to(dtype).double() - exact).norm() / exact.norm()
    # The interpreter truncates to bf16, at most one step of 2**-7; a GPU rounds to nearest.
    truncates = not GPU and dtype == torch.bfloat16
    assert error <= (2**-7 if truncates else max(1.05 * ideal, 3e-7))


@pytest.mark.parametrize("ranks, heads", [(2, 1), (2, 5), (8, 2), (64, 1)])
def test_pack_sends_each_rank_its_own_heads(ranks, heads):
    output = torch.arange(3 * ranks * heads * 64, dtype=torch.float32, device=DEVICE).view(3, ranks * heads, 64)
    lse = torch.arange(3 * ranks * heads, dtype=torch.float32, device=DEVICE).view(3, -1) / 7
    outputs, lses = packed(output, lse, ranks)
    assert torch.equal(outputs, by_destination(output, ranks))
    assert torch.equal(lses, by_destination(lse, ranks))


def test_pack_takes_strided_partials():
    storage = torch.randn(6, 8, 160, device=DEVICE)
    output = storage[::2, :, 32:96]  # rows skipped, head stride 160, offset 32
    lse = torch.randn(8, 3, device=DEVICE).t()
    outputs, lses = packed(output, lse, 4)
    assert torch.equal(outputs, by_destination(output, 4)) and torch.equal(lses, by_destination(lse, 4))
    by_column = torch.randn(3, 64, 8, device=DEVICE).transpose(1, 2)  # the head's elements are not neighbours
    assert torch.equal(packed(by_column, lse, 4)[0], by_destination(by_column, 4))


def test_pack_empties_the_tokens_without_local_kv():
    output = torch.full((4, 4, 64), math.nan, device=DEVICE)
    output[1] = 3.0
    lse = torch.zeros(4, 4, device=DEVICE)
    outputs, lses = packed(output, lse, 2, lengths=torch.tensor([0, 9, 0, 0], dtype=torch.int32, device=DEVICE))
    assert (outputs[:, 1] == 3.0).all() and (lses[:, 1] == 0.0).all()
    assert (outputs[:, [0, 2, 3]] == 0.0).all() and (lses[:, [0, 2, 3]] == -INF).all()


@pytest.mark.parametrize(
    "starts, lengths, live",
    [
        ([0, 1, 2, 3], [5, 0, 1], [True, False, True, False, False, False]),  # decode, then three rows of padding
        ([0, 2, 2, 6], [0, 7, 7], [False, False, True, True, True, True]),  # an empty query of a sequence with KV
        ([0, 6], [1], [True] * 6),
        ([0], [], [False] * 6),  # no sequence at all, as in a capture's warm-up
    ],
)
def test_pack_finds_the_sequence_of_each_token(starts, lengths, live):
    output, lse = torch.ones(6, 4, 64, device=DEVICE), torch.ones(6, 4, device=DEVICE)
    mask = {
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32, device=DEVICE),
    }
    outputs, lses = packed(output, lse, 2, **mask)
    assert (lses[0, :, 0] > -INF).tolist() == live
    assert outputs.amax((0, 2, 3)).tolist() == [float(alive) for alive in live]


def test_pack_finds_sequences_among_many():
    generator = torch.Generator().manual_seed(3)
    queries = torch.randint(0, 4, (37,), generator=generator)
    lengths = torch.randint(0, 2, (37,), generator=generator)
    live = torch.cat([lengths.repeat_interleave(queries), torch.zeros(5, dtype=torch.long)]).bool()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), queries.cumsum(0)]).int()
    mask = {"lengths": lengths.int().to(DEVICE), "query_start_loc": starts.to(DEVICE)}
    _, lses = packed(torch.ones(len(live), 2, 64, device=DEVICE), torch.ones(len(live), 2, device=DEVICE), 2, **mask)
    assert (lses[1, :, 0] > -INF).tolist() == live.tolist()


def test_no_tokens_is_no_work():
    outputs, lses = packed(torch.empty(0, 4, 64, device=DEVICE), torch.empty(0, 4, device=DEVICE), 2)
    output, lse = kernels.combine(outputs, lses)
    assert output.shape == (0, 2, 64) and lse.shape == (0, 2)


@pytest.mark.parametrize("launch", [kernels.Launch(a, w) for a, w in itertools.product((8, 16, 32), (1, 4))])
def test_bits_depend_neither_on_the_batch_nor_on_the_launch(launch):
    outputs, lses = partials(12, 9, 2, 96, torch.bfloat16)
    whole, whole_lse = kernels.combine(outputs, lses)
    part, part_lse = kernels.combine(outputs[:, 4:5].contiguous(), lses[:, 4:5].contiguous(), launch=launch)
    assert torch.equal(part[0], whole[4]) and torch.equal(part_lse[0], whole_lse[4])


def test_ranks_that_hold_equal_partials_may_trade_places():
    outputs, lses = partials(8, 4, 2, 64, torch.bfloat16, empty=0)
    outputs[5], lses[5] = outputs[2], lses[2]
    output, lse = kernels.combine(outputs, lses)
    swapped = [0, 1, 5, 3, 4, 2, 6, 7]
    again, lse_again = kernels.combine(outputs[swapped], lses[swapped])
    assert torch.equal(output, again) and torch.equal(lse, lse_again)


def test_combine_writes_where_it_is_told():
    outputs, lses = partials(2, 3, 2, 64)
    out = torch.full((3, 2, 64), math.nan, device=DEVICE)
    output, lse = kernels.combine(outputs, lses, out=out, return_lse=False)
    assert output is out and lse is None
    assert torch.equal(out, kernels.combine(outputs, lses)[0])


def test_what_does_not_fit_is_refused():
    outputs, lses = partials(2, 3, 2, 64)
    with pytest.raises(ValueError, match='neither "e" nor "2"'):
        kernels.combine(outputs, lses, "10")
    with pytest.raises(ValueError, match="not bf16, fp16 or fp32"):
        kernels.combine(outputs.double(), lses)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.combine(outputs.transpose(1, 2), lses.transpose(1, 2))
    with pytest.raises(ValueError, match="do not divide among 3"):
        PackedLayout.of(torch.empty(1, 4, 64), 3)
    with pytest.raises(ValueError, match="query_start_loc without lengths"):
        packed(outputs[0], lses[0], 2, query_start_loc=torch.zeros(1, dtype=torch.int32, device=DEVICE))


def test_chunks_and_their_lses_start_on_cache_lines():
    layout = PackedLayout(ranks=3, batch=5, heads=1, head_dim=72, dtype=torch.bfloat16)
    # 5 rows of 144 bytes are 720, rounded up to 768; 5 lses are 20 bytes, rounded up to 128
    assert (layout.lse_offset, layout.chunk_bytes, layout.nbytes) == (768, 896, 2688)
    buffer = torch.arange(layout.nbytes, device=DEVICE).to(torch.uint8)
    outputs, lses = layout.outputs(buffer), layout.lses(buffer)
    assert outputs[1].data_ptr() - buffer.data_ptr() == 896
    assert lses[2].data_ptr() - buffer.data_ptr() == 2 * 896 + 768
    with pytest.raises(ValueError, match="2688 bytes"):
        layout.outputs(buffer[1:])


def test_a_workspace_hands_out_the_same_memory_until_it_grows():
    workspace = Workspace(DEVICE)
    first = workspace.buffer("send", 1000)
    assert workspace.buffer("send", 500).data_ptr() == first.data_ptr()
    assert workspace.buffer("receive", 500).data_ptr() != first.data_ptr()
    grown = workspace.buffer("send", 1100)
    assert len(grown) == 1100 and grown.data_ptr() != first.data_ptr()
    assert workspace.pinned_bytes() == 0


def test_a_workspace_keeps_what_a_capture_saw(monkeypatch):
    workspace = Workspace(DEVICE)
    monkeypatch.setattr(Workspace, "_capturing", lambda self: True)
    workspace.buffer("send", 1000)
    monkeypatch.setattr(Workspace, "_capturing", lambda self: False)
    workspace.buffer("send", 3000)
    assert workspace.pinned_bytes() == 1024
    workspace.buffer("send", 9000)  # nothing captured the second
    assert workspace.pinned_bytes() == 1024


@pytest.mark.gpu
@needs_gpu
def test_a_captured_exchange_outlives_the_growth_of_its_workspace():
    workspace = Workspace(DEVICE)
    ranks = 4

    def exchange(output, lse):
        layout = PackedLayout.of(output, ranks)
        send = workspace.buffer("send", layout.nbytes)
        kernels.pack(output, lse, layout.outputs(send), layout.lses(send))
        return kernels.combine(layout.outputs(send), layout.lses(send))

    output = torch.randn(8, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.randn(8, 16, device=DEVICE)
    exchange(output, lse)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, merged_lse = exchange(output, lse)
    exchange(torch.randn(512, 16, 128, device=DEVICE, dtype=torch.bfloat16), torch.randn(512, 16, device=DEVICE))
    for _ in range(3):  # fresh inputs each replay, and the allocator is invited to reuse what growth gave up
        output.normal_()
        lse.normal_()
        poison = [torch.full((1 << 16,), math.nan, device=DEVICE) for _ in range(8)]
        graph.replay()
        expected, expected_lse = merge_partials(by_destination(output, ranks), by_destination(lse, ranks))
        torch.testing.assert_close(merged, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(merged_lse, expected_lse)
        del poison


@pytest.mark.gpu
@needs_gpu
def test_bits_repeat_from_run_to_run():
    outputs, lses = partials(16, 300, 3, 192, torch.bfloat16)
    first, first_lse = kernels.combine(outputs, lses)
    for _ in range(20):
        output, lse = kernels.combine(outputs, lses)
        assert torch.equal(output, first) and torch.equal(lse, first_lse)

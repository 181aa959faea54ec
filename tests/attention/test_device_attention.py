"""The decode kernels behind `PartialAttention`, against fp64: every backend that is here, over paged shards.

Without a GPU our own Triton kernels run in Triton's interpreter; the others are counted as skipped, with the reason.
"""

import importlib
import math
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before the import below
pytest.importorskip("triton", reason="our attention kernels need Triton; not installed")

from helix_runtime.attention import completion, dense_attention_fp64, device, split_kv, split_kv_code, triton_decode  # noqa: E402
from helix_runtime.attention.libraries import BackendAbsent  # noqa: E402
from helix_runtime.combine.merge import merge_partials  # noqa: E402
from helix_runtime.combine.workspace import PackedLayout  # noqa: E402
from helix_runtime.sharding import global_positions, local_length  # noqa: E402

if not GPU:
    importlib.reload(completion)  # another test may have imported it for compilation
    importlib.reload(split_kv_code)
    importlib.reload(split_kv)
    importlib.reload(triton_decode)

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 8e-3 if GPU else 1e-5
INF = float("inf")


def by_kernel(*names):
    """A test a kernel. Triton's run anywhere; those of others are marked `gpu`, and so counted where there is none."""
    marked = [name if name.startswith("TRITON") else pytest.param(name, marks=pytest.mark.gpu) for name in names]
    return pytest.mark.parametrize("name", marked)


def kernel(name, scale, **options):
    """The named kernel, or a skip that says why it is not here."""
    if not GPU and not name.startswith("TRITON"):
        pytest.skip(f"{name} needs a CUDA device")
    try:
        return device.decode_kernel(name, scale, **options)
    except BackendAbsent as absent:
        pytest.skip(str(absent))


class Shards:
    """Random requests of given lengths, dealt to `kvp` paged caches; stale slots hold NaN."""

    def __init__(self, lengths, *, heads, kv_heads, dim, value_dim=None, kvp=1, interleave=1, page=64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(DTYPE)

        self.lengths, self.kvp, self.interleave, self.page = lengths, kvp, interleave, page
        self.latent = value_dim is not None
        self.scale = dim**-0.5
        self.query = 2 * normal(len(lengths), heads, dim)
        self.keys = [normal(length, kv_heads, dim) for length in lengths]
        self.values = (
            [key[..., :value_dim] for key in self.keys] if self.latent else [normal(*k.shape) for k in self.keys]
        )
        needed = [max(1, -(-length // (page * kvp))) for length in lengths]
        ids = torch.randperm(sum(needed) + 2, generator=generator).to(torch.int32)
        self.table = torch.full((len(lengths), max(needed) + 1), int(ids[-1]), dtype=torch.int32)
        for row, count in enumerate(needed):
            self.table[row, :count] = ids[sum(needed[:row]) :][:count]

    def local_lengths(self, rank):
        local = [local_length(length, self.kvp, rank, self.interleave) for length in self.lengths]
        return torch.tensor(local, dtype=torch.int32, device=DEVICE)

    def cache(self, rank):
        """[blocks, 2, page, Hkv, D], or latents [blocks, page, D]."""
        _, kv_heads, dim = self.keys[0].shape
        cache = torch.full((int(self.table.max()) + 1, 2, self.page, kv_heads, dim), math.nan, dtype=DTYPE)
        for row, length in enumerate(self.lengths):
            count = local_length(length, self.kvp, rank, self.interleave)
            at = global_positions(count, kvp=self.kvp, kvp_rank=rank, interleave=self.interleave)
            index = torch.arange(count)
            block, slot = self.table[row, index // self.page].long(), index % self.page
            cache[block, 0, slot] = self.keys[row][at]
            cache[block, 1, slot, :, : self.values[row].shape[2]] = self.values[row][at]
        return (cache[:, 0, :, 0] if self.latent else cache).contiguous().to(DEVICE)

    def exact(self, row, positions=None):
        """fp64 (output [Hq, Dv], lse [Hq]) of one row over all its keys, or over those at `positions`."""
        keep = slice(None) if positions is None else positions
        query, keys, values = self.query[row : row + 1], self.keys[row][keep], self.values[row][keep]
        given = (part.to(DEVICE) for part in (query, keys, values))
        output, lse = dense_attention_fp64(*given, scale=self.scale, causal=False)
        return output[0].cpu(), lse[0].cpu()


def close(found, expected):
    found = found.double().cpu()
    assert (found - expected).norm() <= TOLERANCE * expected.norm().clamp(min=1e-3)


GQA_SHAPES = [(8, 1, 128), (8, 2, 64), (4, 4, 128), (16, 1, 64)]
if GPU:
    GQA_SHAPES += [(8, 1, 256), (32, 8, 128)]


@pytest.mark.parametrize("heads, kv_heads, dim", GQA_SHAPES)
@pytest.mark.parametrize("page", [16, 64, 128] if GPU else [16, 64])
@by_kernel(*device.GQA_KERNELS)
def test_partials_of_every_rank_are_exact_and_merge_to_the_whole(name, heads, kv_heads, dim, page):
    """Lengths with empty shards (1), a ragged end, and more than one page; three ranks, interleave 4."""
    shards = Shards([1, 150, 37, 7], heads=heads, kv_heads=kv_heads, dim=dim, kvp=3, interleave=4, page=page)
    decode = kernel(name, shards.scale)
    query, table, parts = shards.query.to(DEVICE), shards.table.to(DEVICE), []
    for rank in range(3):
        attention = device.DeviceAttention(decode, kvp=3, kvp_rank=rank, interleave=4)
        lengths = shards.local_lengths(rank)
        output, lse = attention.partial(query, shards.cache(rank), table, lengths)
        for row, count in enumerate(lengths.tolist()):
            if count == 0:
                assert (output[row] == 0).all() and (lse[row] == -INF).all()
                continue
            at = global_positions(count, kvp=3, kvp_rank=rank, interleave=4)
            expected, expected_lse = shards.exact(row, at)
            close(output[row], expected)
            torch.testing.assert_close(lse[row].double().cpu(), expected_lse, rtol=2e-3, atol=2e-2 if GPU else 1e-4)
        parts.append((output, lse))
    merged, _ = merge_partials(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    for row in range(len(shards.lengths)):
        close(merged[row], shards.exact(row)[0])


@pytest.mark.parametrize("heads", [16, 128] if GPU else [5, 16])
@by_kernel(*device.MLA_KERNELS)
def test_latent_partials_are_exact(name, heads, request):
    if GPU and (name, heads) == ("FLASH_ATTN_MLA", 128):
        why = "NaN where a shard holds one token, with NaN in the slots behind it; `choice` takes FLASHMLA there"
        request.applymarker(pytest.mark.xfail(strict=True, reason=why))
    shards = Shards([1, 90, 200], heads=heads, kv_heads=1, dim=576, value_dim=512, kvp=2, interleave=1)
    decode = kernel(name, shards.scale)
    for rank in range(2):
        attention = device.DeviceAttention(decode, kvp=2, kvp_rank=rank)
        lengths = shards.local_lengths(rank)
        output, lse = attention.partial(shards.query.to(DEVICE), shards.cache(rank), shards.table.to(DEVICE), lengths)
        for row, count in enumerate(lengths.tolist()):
            if count == 0:
                assert (output[row] == 0).all() and (lse[row] == -INF).all()
                continue
            expected, expected_lse = shards.exact(row, global_positions(count, kvp=2, kvp_rank=rank))
            close(output[row], expected)
            torch.testing.assert_close(lse[row].double().cpu(), expected_lse, rtol=2e-3, atol=2e-2 if GPU else 1e-4)


@by_kernel(*device.GQA_KERNELS)
def test_new_tokens_of_a_chunk_see_their_own_past_and_padding_sees_nothing(name):
    """One request of 9 tokens with its last 3 new, and a padding row; rank 1 of 2, interleave 2: keys 2 3 6 7."""
    shards = Shards([9], heads=4, kv_heads=1, dim=64, kvp=2, interleave=2, page=16, seed=3)
    query = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(5)).to(DTYPE)
    attention = device.DeviceAttention(kernel(name, shards.scale), kvp=2, kvp_rank=1, interleave=2)
    output, lse = attention.partial(
        query.to(DEVICE),
        shards.cache(1),
        shards.table.to(DEVICE),
        shards.local_lengths(1),
        query_start_loc=torch.tensor([0, 3], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([9], dtype=torch.int32, device=DEVICE),
    )
    for row, seen in enumerate([[2, 3, 6], [2, 3, 6, 7], [2, 3, 6, 7]]):  # positions 6, 7, 8
        expected, _ = dense_attention_fp64(
            query[row : row + 1], shards.keys[0][seen], shards.values[0][seen], scale=shards.scale, causal=False
        )
        close(output[row], expected[0])
    assert (output[3] == 0).all() and (lse[3] == -INF).all()


@by_kernel("TRITON", "FLASH_ATTN")
@pytest.mark.parametrize("heads, kv_heads, ranks", [(8, 1, 4), (8, 2, 8)])
def test_attention_writes_straight_into_the_send_buffer(name, heads, kv_heads, ranks):
    shards = Shards([40, 3, 100], heads=heads, kv_heads=kv_heads, dim=64, kvp=4, interleave=4)
    decode = kernel(name, shards.scale)
    query, table, cache, lengths = (
        shards.query.to(DEVICE),
        shards.table.to(DEVICE),
        shards.cache(1),
        shards.local_lengths(1),
    )
    output, lse = device.DeviceAttention(decode).partial(query, cache, table, lengths)
    layout = PackedLayout.of(query, ranks)
    buffer = torch.full((layout.nbytes,), 0x7F, dtype=torch.uint8, device=DEVICE)
    outputs, lses = layout.outputs(buffer), layout.lses(buffer)
    assert decode.sends(heads, kv_heads, ranks)
    decode.send(query, cache, table, lengths, outputs, lses)
    live = lengths > 0
    assert not bool(live.all())
    sent = outputs.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(sent[live], output[live], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lses.transpose(0, 1).flatten(1, 2), lse, rtol=1e-3, atol=1e-3)


def test_a_row_has_the_same_bits_in_any_batch_when_the_runs_are_fixed():
    shards = Shards([100, 300, 64], heads=8, kv_heads=1, dim=64)
    attention = device.DeviceAttention(kernel("TRITON", shards.scale, splits=3))
    query, table, cache = shards.query.to(DEVICE), shards.table.to(DEVICE), shards.cache(0)
    whole, _ = attention.partial(query, cache, table, shards.local_lengths(0))
    alone, _ = attention.partial(query[1:2], cache, table[1:2], shards.local_lengths(0)[1:2])
    assert torch.equal(whole[1:2], alone)


class Base2:
    """A kernel that answers in base 2 and leaves garbage on empty rows."""

    name, needs_plan, settles_empty, scale = "BASE2", False, False, 0.125

    def decode(self, query, kv_cache, block_table, lengths):
        output = torch.full_like(query, math.nan)
        output[lengths > 0] = 3.0
        lse = torch.full(query.shape[:2], INF)
        lse[lengths > 0] = 1.0 * math.log2(math.e) + 1.0
        return output, lse


def test_the_base_of_a_kernel_is_measured_and_settled():
    """The probe's two keys score 1 each: LSE 1 + ln 2 = 1.6931 natural, 2.4427 in base 2."""
    output, lse = device.DeviceAttention(Base2()).partial(
        torch.zeros(2, 1, 64), torch.zeros(1, 2, 16, 1, 64), torch.zeros(2, 1, dtype=torch.int32), torch.tensor([2, 0])
    )
    assert lse[0].item() == pytest.approx(1 + math.log(2), abs=1e-6)
    assert output[0].tolist() == [[3.0] * 64]
    assert output[1].tolist() == [[0.0] * 64] and lse[1].item() == -INF


def test_an_lse_of_no_known_base_is_refused():
    class Broken(Base2):
        name = "BROKEN"

        def decode(self, query, kv_cache, block_table, lengths):
            return query, torch.ones(query.shape[:2])

    with pytest.raises(BackendAbsent, match="where base e gives"):
        device.DeviceAttention(Broken()).partial(
            torch.zeros(1, 1, 64), torch.zeros(1, 2, 16, 1, 64), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2])
        )


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@by_kernel(*device.GQA_KERNELS)
def test_a_context_of_300k_tokens_a_rank(name):
    length = 300_001
    shards = Shards([length], heads=8, kv_heads=1, dim=128, page=64)
    output, lse = device.DeviceAttention(kernel(name, shards.scale)).partial(
        shards.query.to(DEVICE), shards.cache(0), shards.table.to(DEVICE), shards.local_lengths(0)
    )
    expected, expected_lse = shards.exact(0)
    close(output[0], expected)
    torch.testing.assert_close(lse[0].double().cpu(), expected_lse, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@by_kernel(*device.MLA_KERNELS)
def test_a_latent_context_of_270k_tokens_a_rank(name):
    shards = Shards([270_007], heads=16, kv_heads=1, dim=576, value_dim=512)
    output, lse = device.DeviceAttention(kernel(name, shards.scale)).partial(
        shards.query.to(DEVICE), shards.cache(0), shards.table.to(DEVICE), shards.local_lengths(0)
    )
    expected, expected_lse = shards.exact(0)
    close(output[0], expected)
    torch.testing.assert_close(lse[0].double().cpu(), expected_lse, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@by_kernel("FLASH_ATTN", "TRITON")
def test_a_captured_partial_follows_new_lengths_and_tables(name):
    shards = Shards([200, 130], heads=8, kv_heads=1, dim=128)
    attention = device.DeviceAttention(kernel(name, shards.scale))
    query, table, cache, lengths = (
        shards.query.to(DEVICE),
        shards.table.to(DEVICE),
        shards.cache(0),
        shards.local_lengths(0),
    )
    attention.partial(query, cache, table, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = attention.partial(query, cache, table, lengths)
    lengths.copy_(torch.tensor([77, 0], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    expected, _ = shards.exact(0, torch.arange(77))
    close(output[0], expected)
    assert (lse[1] == -INF).all()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@by_kernel("FLASH_ATTN", "TRITON")
def test_attention_pack_and_combine_replay_with_other_lengths_tables_and_batch_sizes(name):
    """Two ranks' attention, pack, exchange and combine in one graph; then other lengths, blocks moved, fewer rows."""
    from helix_runtime.combine import kernels

    ranks, batch = 2, 4
    shards = Shards([200, 130, 77, 260], heads=8, kv_heads=1, dim=128, kvp=ranks, interleave=16)
    attention = [device.DeviceAttention(kernel(name, shards.scale)) for _ in range(ranks)]
    query, table = shards.query.to(DEVICE), shards.table.to(DEVICE)
    caches = [shards.cache(rank) for rank in range(ranks)]
    lengths = [shards.local_lengths(rank) for rank in range(ranks)]
    sends = None

    def step():
        nonlocal sends
        partials = [attention[rank].partial(query, caches[rank], table, lengths[rank]) for rank in range(ranks)]
        layout = PackedLayout.of(partials[0][0], ranks)
        sends = sends or [torch.empty(layout.nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(ranks)]
        for send, (output, lse) in zip(sends, partials, strict=True):
            kernels.pack(output, lse, layout.outputs(send), layout.lses(send))
        merged = []
        for rank in range(ranks):  # what the All-to-All would bring to `rank`
            outputs = torch.stack([layout.outputs(send)[rank] for send in sends])
            lses = torch.stack([layout.lses(send)[rank] for send in sends])
            merged.append(kernels.combine(outputs, lses)[0])
        return torch.cat(merged, 1)

    step()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay_and_check(now):
        for rank in range(ranks):
            local = [local_length(length, ranks, rank, shards.interleave) for length in now]
            lengths[rank].copy_(torch.tensor(local, dtype=torch.int32))
        for send in sends:
            send.fill_(0xAB)
        graph.replay()
        torch.cuda.synchronize()
        for row, length in enumerate(now):
            if length:
                close(found[row], shards.exact(row, torch.arange(length))[0])
            else:
                assert (found[row] == 0).all()

    replay_and_check(shards.lengths)
    replay_and_check([9, 130, 1, 17])  # shards of rank 1 become empty
    replay_and_check([200, 31, 0, 0])  # a smaller batch: the rows behind it are padding
    moved = torch.randperm(caches[0].shape[0], generator=torch.Generator().manual_seed(5))
    for cache in caches:
        cache.copy_(cache[torch.argsort(moved).to(DEVICE)].clone())
    table.copy_(moved.to(torch.int32)[shards.table.long()])
    replay_and_check(shards.lengths)
    assert found.shape == (batch, 8, 128)

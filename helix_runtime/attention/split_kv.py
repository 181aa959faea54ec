"""Our split-KV decode attention in Triton, for GQA and MLA: many programs share one row's long context, then join.

Written for one KV head and a long context, where a rank has few rows and each must keep the whole GPU reading. It
writes its result, LSE included, wherever the exchange wants it, so that no pack follows. Which backend runs is decided
by `choice`, from measurements.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from helix_runtime.attention.split_kv_code import gqa_kernel, join_kernel, mla_kernel
from helix_runtime.combine.kernels import overlaps


@dataclass(frozen=True)
class Launch:
    """Size of one program: `tile` keys at a time, `warps` warps, `stages` tiles in flight."""

    tile: int
    warps: int
    stages: int


#: Measured on an H200, benchmarks/results/attention-h200.json.
GQA_LAUNCH = Launch(tile=64, warps=4, stages=2)
MLA_LAUNCH = Launch(tile=64, warps=8, stages=2)
#: For an attention whose rows are waited for while it runs (`done`): about so many programs, so that the rows that are
#: under way at any time, and whose exchange is left when it ends, are few; and two to a multiprocessor, beside which a
#: join and a copy of 128 threads still fit.
COUNTED_LAUNCH = Launch(tile=128, warps=8, stages=2)
COUNTED_PROGRAMS = 4096
#: Heads that one MLA program holds: 16 fills a tensor-core tile, 64 is what the registers hold.
MLA_HEADS = (16, 32, 64)
#: Programs per multiprocessor that the split count aims at.
WAVES = 4
MAX_SPLITS = 1024


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 elsewhere (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def split_count(programs: int, device: torch.device, waves: int = WAVES) -> int:
    """Runs into which each row's context is cut when one split has `programs` programs; a fixed number, no power."""
    return max(1, min(MAX_SPLITS, waves * multiprocessors(device) // programs))


def counted_splits(rows: int, tokens: int, programs: int = COUNTED_PROGRAMS) -> int:
    """Runs of a context of `tokens` keys that give about `programs` programs for `rows` (requests * KV heads); a power
    of two, and no run below 256 keys."""
    return max(1, min(1 << round(math.log2(max(1.0, programs / rows))), tokens // 256))


def decode_gqa(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    splits: int | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query token a row over its first `lengths` local keys.

    query: [T, Hq, D], D contiguous, a power of two from 64 to 256; keys, values: [blocks, block_size, Hkv, D], any
    strides but the last; block_size a power of two; block_table: int32 [T, max_blocks]; lengths: int32 [T], 0 for an
    empty shard. `out` [N, T, Hq / N, D] and `lse` [N, T, Hq / N] may be views of a send buffer (`PackedLayout`), each
    contiguous within a row; without them both are allocated with N = 1 and returned as [T, Hq, D] and [T, Hq].

    Returns (output, natural-log fp32 lse); an empty row is 0 and -inf. `splits` fixes the number of runs, and with it
    the bits of a row whatever the batch around it.
    """
    parts = gqa_runs(query, keys, values, block_table, lengths, scale, splits=splits, launch=launch)
    return join(*parts, query.dtype, out, lse, follows=True)


def gqa_runs(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    splits: int | None = None,
    launch: Launch | None = None,
    done: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `decode_gqa`: (part [T, splits, Hq, D], part_lse [T, splits, Hq]), fp32, for `join`.

    done: `completion.counters` [T], each of which rises by splits * Hkv, so that rows can be joined while others are
    still attended. The same bits with it and without.
    """
    rows, heads, dim = query.shape
    kv_heads, page = keys.shape[2], keys.shape[1]
    group = heads // kv_heads
    launch = launch or GQA_LAUNCH
    splits = splits or split_count(rows * kv_heads, query.device)
    part, part_lse = _parts(query, rows, splits, heads, dim)
    gqa_kernel[(splits, kv_heads, rows)](
        query,
        keys,
        values,
        block_table,
        lengths,
        part,
        part_lse,
        done,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        block_table.stride(0),
        splits,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        KV_HEADS=kv_heads,
        DIM=dim,
        PAGE=page,
        TILE=launch.tile,
        PDL=overlaps(query.device),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return part, part_lse


def decode_mla(
    query: torch.Tensor,
    latents: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    value_dim: int = 512,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    splits: int | None = None,
    launch: Launch = MLA_LAUNCH,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode_gqa`, over latents [blocks, block_size, value_dim + rope]: query [T, H, value_dim + rope], output
    [T, H, value_dim]. value_dim and the rest are powers of two (512 and 64 for DeepSeek)."""
    rows, heads, width = query.shape
    block_h = next((size for size in MLA_HEADS if heads <= size), MLA_HEADS[-1])
    head_blocks = triton.cdiv(heads, block_h)
    splits = splits or split_count(rows * head_blocks, query.device, waves=1)
    part, part_lse = _parts(query, rows, splits, heads, value_dim)
    mla_kernel[(splits, head_blocks, rows)](
        query,
        latents,
        block_table,
        lengths,
        part,
        part_lse,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        latents.stride(0),
        latents.stride(1),
        block_table.stride(0),
        splits,
        HEADS=heads,
        BLOCK_H=block_h,
        RANK=value_dim,
        ROPE=width - value_dim,
        PAGE=latents.shape[1],
        TILE=launch.tile,
        PDL=overlaps(query.device),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return join(part, part_lse, query.dtype, out, lse, follows=True)


def _parts(query: torch.Tensor, rows: int, splits: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    part = query.new_empty((rows, splits, heads, dim), dtype=torch.float32)
    return part, query.new_empty((rows, splits, heads), dtype=torch.float32)


def join(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    follows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of `decode_gqa`, which may run on another stream: merge the runs and write `out` and `lse`.

    follows: the runs are the kernel before this one on the same stream, so that this one may be started early.
    """
    rows, splits, heads, dim = part.shape
    plain = out is None
    if plain:
        out = part.new_empty((1, rows, heads, dim), dtype=dtype)
        lse = part.new_empty((1, rows, heads))
    ranks, each = out.shape[0], out.shape[2]
    if ranks * each != heads or out.shape[1] != rows or lse.shape != out.shape[:3]:
        raise ValueError(f"cannot write [{rows}, {heads}, {dim}] into {tuple(out.shape)} and {tuple(lse.shape)}")
    padded = triton.next_power_of_2(splits)
    columns = max(16, min(dim, 8192 // padded))
    early = follows and overlaps(part.device)
    join_kernel[(rows, heads, dim // columns)](
        part,
        part_lse,
        out,
        lse,
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        lse.stride(1),
        splits,
        HEADS=heads,
        HEADS_EACH=each,
        DIM=dim,
        COLUMNS=columns,
        SPLITS_PAD=padded,
        PDL=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
    return (out[0], lse[0]) if plain else (out, lse)

"""The code of the three kernels that `split_kv` launches.

A row is one query token; its local keys are cut into `splits` runs of whole tiles, and one program attends one run for
one group of query heads (those that read the same KV head). Scores are kept as powers of two inside, so that the
softmax is `exp2`; what is stored between the kernels is a natural-log LSE. Offsets into the cache are 64-bit.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from helix_runtime.attention.completion import count_done


@triton.jit
def gqa_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    lengths_ptr,
    part_ptr,
    part_lse_ptr,
    done_ptr,
    scale_log2,
    query_stride_t,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_head,
    value_stride_block,
    value_stride_token,
    value_stride_head,
    table_stride,
    splits,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One run of keys for a KV head's GROUP query heads; part [T, splits, Hq, D] fp32, part_lse [T, splits, Hq].
    done_ptr: None, or counters [T] of the programs that are done (`completion`)."""
    if PDL:
        gdc_launch_dependents()
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    tiles = tl.cdiv(length, TILE)
    first = (tiles * split) // splits * TILE
    last = tl.minimum((tiles * (split + 1)) // splits * TILE, length)

    head = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, DIM)
    real = head < GROUP
    query = tl.load(
        query_ptr + row * query_stride_t + (kv_head * GROUP + head)[:, None] * query_stride_h + column[None, :],
        mask=real[:, None],
        other=0.0,
    )
    top = tl.full([GROUP_PAD], -float("inf"), tl.float32)
    total = tl.full([GROUP_PAD], 0.0, tl.float32)
    merged = tl.full([GROUP_PAD, DIM], 0.0, tl.float32)
    table = table_ptr + row * table_stride
    token = tl.arange(0, TILE)
    for start in tl.range(first, last, TILE):
        position = start + token
        inside = position < length
        if PAGE >= TILE:  # a tile lies in one page
            page = tl.load(table + start // PAGE).to(tl.int64)
            slot = start % PAGE + token
            key_at = page * key_stride_block + slot * key_stride_token
            value_at = page * value_stride_block + slot * value_stride_token
        else:
            page = tl.load(table + position // PAGE, mask=inside, other=0).to(tl.int64)
            slot = position % PAGE
            key_at = page * key_stride_block + slot * key_stride_token
            value_at = page * value_stride_block + slot * value_stride_token
        keys = tl.load(
            key_ptr + key_at[None, :] + kv_head * key_stride_head + column[:, None], mask=inside[None, :], other=0.0
        )
        # Slots past the end may hold anything, NaN too, and 0 * NaN is NaN: they are loaded as 0.
        values = tl.load(
            value_ptr + value_at[:, None] + kv_head * value_stride_head + column[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        scores = tl.dot(query, keys) * scale_log2
        scores = tl.where(inside[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        merged = merged * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        top = higher

    some = total > 0.0
    merged = merged / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, -float("inf"))
    at = (row * splits + split) * (KV_HEADS * GROUP) + kv_head * GROUP + head
    tl.store(part_ptr + at[:, None] * DIM + column[None, :], merged, mask=real[:, None])
    tl.store(part_lse_ptr + at, lse, mask=real)
    if done_ptr is not None:
        count_done(done_ptr, row)


@triton.jit
def mla_kernel(
    query_ptr,
    latent_ptr,
    table_ptr,
    lengths_ptr,
    part_ptr,
    part_lse_ptr,
    scale_log2,
    query_stride_t,
    query_stride_h,
    latent_stride_block,
    latent_stride_token,
    table_stride,
    splits,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One run of latents [RANK + ROPE] for BLOCK_H heads: values are the latents' first RANK columns, loaded once."""
    if PDL:
        gdc_launch_dependents()
    split = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    tiles = tl.cdiv(length, TILE)
    first = (tiles * split) // splits * TILE
    last = tl.minimum((tiles * (split + 1)) // splits * TILE, length)

    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = head < HEADS
    column = tl.arange(0, RANK)
    rope_column = RANK + tl.arange(0, ROPE)
    at = query_ptr + row * query_stride_t + head[:, None] * query_stride_h
    query = tl.load(at + column[None, :], mask=real[:, None], other=0.0)
    rope = tl.load(at + rope_column[None, :], mask=real[:, None], other=0.0)
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.full([BLOCK_H], 0.0, tl.float32)
    merged = tl.full([BLOCK_H, RANK], 0.0, tl.float32)
    table = table_ptr + row * table_stride
    token = tl.arange(0, TILE)
    for start in tl.range(first, last, TILE):
        position = start + token
        inside = position < length
        if PAGE >= TILE:
            page = tl.load(table + start // PAGE).to(tl.int64)
            latent_at = page * latent_stride_block + (start % PAGE + token) * latent_stride_token
        else:
            page = tl.load(table + position // PAGE, mask=inside, other=0).to(tl.int64)
            latent_at = page * latent_stride_block + (position % PAGE) * latent_stride_token
        latents = tl.load(latent_ptr + latent_at[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        ropes = tl.load(latent_ptr + latent_at[None, :] + rope_column[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(rope, ropes)
        scores = tl.dot(query, tl.trans(latents), scores) * scale_log2
        scores = tl.where(inside[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        merged = merged * shrink[:, None] + tl.dot(weights.to(latents.dtype), latents)
        top = higher

    some = total > 0.0
    merged = merged / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, -float("inf"))
    to = (row * splits + split) * HEADS + head
    tl.store(part_ptr + to[:, None] * RANK + column[None, :], merged, mask=real[:, None])
    tl.store(part_lse_ptr + to, lse, mask=real)


@triton.jit
def join_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    out_stride_rank,
    out_stride_t,
    lse_stride_rank,
    lse_stride_t,
    splits,
    HEADS: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge a row's runs and write it where the exchange wants it: head h is head h % HEADS_EACH of rank
    h // HEADS_EACH. PDL: started while the runs are still computed, and waits for them here."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS_PAD)
    there = split < splits
    at = (row * splits + split) * HEADS + head
    lses = tl.load(part_lse_ptr + at, mask=there, other=-float("inf"))
    parts = tl.load(part_ptr + at[:, None] * DIM + column[None, :], mask=there[:, None], other=0.0)
    top = tl.max(lses, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2((lses - top) * 1.4426950408889634)
    total = tl.sum(weights, 0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    rank = (head // HEADS_EACH).to(tl.int64)
    inner = head % HEADS_EACH
    out = out_ptr + rank * out_stride_rank + row * out_stride_t + inner * DIM + column
    tl.store(out, merged.to(out_ptr.dtype.element_ty))
    if tl.program_id(2) == 0:
        lse = tl.where(
            total == 0.0, -float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)) * 0.6931471805599453
        )
        tl.store(lse_ptr + rank * lse_stride_rank + row * lse_stride_t + inner, lse)

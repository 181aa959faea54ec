"""Triton kernels for the two ends of the exchange: pack before the All-to-All, combine after it.

Both move each byte once. A row of D elements is cut into segments of WIDTH elements, the largest power of two that
divides D (at most 128), so that head sizes such as 96, 192 or 576 waste no lane; a program handles BLOCK segments,
which lie side by side in the exchange buffer. Sizes of BLOCK and the number of warps follow a rule measured on an
H200 (``benchmarks/combine.py --sweep``); nothing is tuned at run time, nothing synchronises with the host, and every
launch can be captured in a CUDA graph.

The merge means what ``merge.merge_partials`` means. It adds the ranks one after the other, 0 to N-1, in fp32, so that a
row's bits depend on its own partials and on nothing else: not on the batch around it, not on the launch's sizes, not
on which rank computes it.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from helix_runtime.combine.merge import LseBase

#: What the kernels move, and the integers of the same width that pack moves it as.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@triton.jit
def _pack_kernel(
    out_ptr,
    lse_ptr,
    send_out_ptr,
    send_lse_ptr,
    lengths_ptr,
    starts_ptr,
    rows,
    sequences,
    search_steps,
    out_stride_b,
    out_stride_h,
    out_stride_d,
    lse_stride_b,
    lse_stride_h,
    send_out_stride,
    send_lse_stride,
    HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
):
    """Copy BLOCK segments of one destination. MASK: 0 none, 1 a length per row, 2 a length per sequence."""
    rank = tl.program_id(1)
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = segment // SEGMENTS
    inside = row < rows
    part = (segment % SEGMENTS) * WIDTH
    token = (row // HEADS).to(tl.int64)
    head = rank * HEADS + row % HEADS
    column = tl.arange(0, WIDTH)

    # The row is read before anything is known of it: the loads of data, LSE and mask overlap, the selection is free.
    source = token * out_stride_b + head * out_stride_h + part * out_stride_d
    bits = tl.load(out_ptr + source[:, None] + column[None, :] * out_stride_d, mask=inside[:, None], other=0)
    lse = tl.load(lse_ptr + token * lse_stride_b + head * lse_stride_h, mask=inside, other=0.0).to(tl.float32)

    # NaN and +inf stay: they mean that something is broken, and the merge says so (see merge.py).
    live = lse != -float("inf")
    if MASK == 1:
        live = live & (tl.load(lengths_ptr + token, mask=inside, other=0) > 0)
    if MASK == 2:
        # Which sequence owns the token: the number of ends at or before it. Tokens past the last end are padding.
        low = tl.full([BLOCK], 0, tl.int32)
        high = low + sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            searching = low < high
            end = tl.load(starts_ptr + 1 + middle, mask=searching, other=0)
            after = end <= token
            low = tl.where(searching & after, middle + 1, low)
            high = tl.where(searching & (end > token), middle, high)
        live = live & (tl.load(lengths_ptr + low, mask=inside & (low < sequences), other=0) > 0)

    bits = tl.where(live[:, None], bits, 0)
    lse = tl.where(live, lse, -float("inf"))
    target = send_out_ptr + rank.to(tl.int64) * send_out_stride + segment.to(tl.int64)[:, None] * WIDTH
    tl.store(target + column[None, :], bits, mask=inside[:, None])
    first = inside & (part == 0)
    tl.store(send_lse_ptr + rank.to(tl.int64) * send_lse_stride + row, lse, mask=first)


@triton.jit
def _combine_kernel(
    outputs_ptr,
    lses_ptr,
    merged_ptr,
    merged_lse_ptr,
    rows,
    outputs_stride,
    lses_stride,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BASE_E: tl.constexpr,
    WRITE_LSE: tl.constexpr,
):
    """Merge RANKS partials of BLOCK segments, GROUP ranks at a time, rescaling what was summed before each group."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = segment // SEGMENTS
    inside = row < rows
    offset = segment.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale: tl.constexpr = 1.4426950408889634 if BASE_E else 1.0
    outputs_step = tl.cast(outputs_stride, tl.int64)
    lses_step = tl.cast(lses_stride, tl.int64)

    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    merged = tl.full([BLOCK, WIDTH], 0.0, tl.float32)
    for first in range(0, RANKS, GROUP):
        # The barrier keeps the compiler from sinking the wide loads to their uses, behind the wait for the LSEs: all
        # of a group's loads wait for memory together. Without it a small batch pays the latency of memory twice.
        partials = ()
        for step in tl.static_range(GROUP):
            source = outputs_ptr + (first + step) * outputs_step + offset
            partials += (tl.load(source, mask=inside[:, None] & (first + step < RANKS), other=0.0),)
        tl.debug_barrier()
        lses = ()
        for step in tl.static_range(GROUP):
            source = lses_ptr + (first + step) * lses_step + row
            lses += (tl.load(source, mask=inside & (first + step < RANKS), other=-float("inf")),)

        before = top
        for step in tl.static_range(GROUP):
            top = tl.where(lses[step] > top, lses[step], top)
        # Rows without any live partial so far subtract 0: -inf - -inf would be NaN.
        finite_top = tl.where(top == -float("inf"), 0.0, top)
        shrink = tl.exp2((before - finite_top) * scale)
        total *= shrink
        merged *= shrink[:, None]
        for step in tl.static_range(GROUP):
            weight = tl.exp2((lses[step] - finite_top) * scale)
            live = lses[step] != -float("inf")
            merged += tl.where(live[:, None], partials[step].to(tl.float32), 0.0) * weight[:, None]
            total += weight

    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(merged_ptr + offset, merged.to(merged_ptr.dtype.element_ty), mask=inside[:, None])
    if WRITE_LSE:
        lse = tl.log(total) + (top if BASE_E else top * 0.6931471805599453)
        tl.store(merged_lse_ptr + row, lse, mask=inside & (segment % SEGMENTS == 0))


@dataclass(frozen=True)
class Launch:
    """Size of one program: `vectors` accesses of 16 bytes per thread (and rank), `warps` warps of 32 threads."""

    vectors: int
    warps: int

    def block(self, width: int, itemsize: int) -> int:
        """Segments of `width` elements that one program handles."""
        return max(1, self.vectors * self.warps * 32 * 16 // itemsize // width)


def pack_launch(nbytes: int) -> Launch:
    """The launch of a pack of `nbytes` of output."""
    return Launch(2, 4)


def combine_launch(nbytes: int, ranks: int) -> Launch:
    """The launch of a combine that reads `nbytes` of output from `ranks` ranks."""
    return Launch(1, 4)


def pack(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    outputs: torch.Tensor,
    lses: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """Sort one rank's partials by destination, and empty the rows of empty shards, in one launch.

    partial_output: [B, N * H, D] bf16, fp16 or fp32, any strides; partial_lse: [B, N * H] fp32, any strides. `outputs`
    [N, B, H, D] and `lses` [N, B, H], views of a send buffer (`PackedLayout`), are written: chunk n gets the heads
    [n * H, (n + 1) * H).

    A row whose lse is -inf is written as output 0, lse -inf, whatever its output held. So are the rows that the mask
    calls empty: `lengths` [B] alone gives each token's local KV length, with 0 for an empty shard or a padding row;
    with `query_start_loc` [S + 1], `lengths` [S] are those of sequences, sequence s owns the tokens
    [query_start_loc[s], query_start_loc[s + 1]), and tokens past the last one are padding. Both int32, on the device.

    Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    ranks, batch, heads, head_dim = outputs.shape
    rows = batch * heads
    _check_exchange(outputs, lses)
    if partial_output.shape != (batch, ranks * heads, head_dim) or partial_output.dtype != outputs.dtype:
        found = f"{partial_output.dtype} {tuple(partial_output.shape)}"
        raise ValueError(f"cannot pack {found} into outputs {outputs.dtype} {tuple(outputs.shape)}")
    if partial_lse.shape != (batch, ranks * heads) or partial_lse.dtype != torch.float32:
        raise ValueError(f"partial_lse is {partial_lse.dtype} {tuple(partial_lse.shape)}, not fp32 [B, N * H]")
    sequences = _check_mask(lengths, query_start_loc, batch)
    if rows == 0:
        return
    launch = launch or pack_launch(partial_output.numel() * partial_output.itemsize)
    width = _width(head_dim)
    block = launch.block(width, outputs.itemsize)
    bits = _BITS[outputs.dtype]
    _pack_kernel[(triton.cdiv(rows * (head_dim // width), block), ranks)](
        partial_output.view(bits),
        partial_lse,
        outputs.view(bits),
        lses,
        lengths,
        query_start_loc,
        rows,
        sequences,
        sequences.bit_length(),
        *partial_output.stride(),
        *partial_lse.stride(),
        outputs.stride(0),
        lses.stride(0),
        HEADS=heads,
        SEGMENTS=head_dim // width,
        WIDTH=width,
        BLOCK=block,
        MASK=0 if lengths is None else 1 if query_start_loc is None else 2,
        num_warps=launch.warps,
    )


def combine(
    outputs: torch.Tensor,
    lses: torch.Tensor,
    base: LseBase = "e",
    *,
    return_lse: bool = True,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge the partials that N ranks sent, in one launch: `merge.merge_partials` for the GPU.

    outputs: [N, B, H, D] bf16, fp16 or fp32; lses: [N, B, H] fp32, logarithms of `base`, -inf for an empty partial,
    whose output is not read into the sum; both contiguous within each rank (`PackedLayout` views, or whole tensors).
    Returns (output [B, H, D] in the dtype of outputs, natural-log lse [B, H] fp32, or None without `return_lse`).
    Where all partials are empty the output is 0 and the lse -inf. `out` [B, H, D], contiguous, is written if given.

    Raises ValueError for shapes, strides, dtypes or bases that do not fit.
    """
    if base not in ("e", "2"):
        raise ValueError(f'lse base {base!r} is neither "e" nor "2"')
    ranks, batch, heads, head_dim = outputs.shape
    rows = batch * heads
    _check_exchange(outputs, lses)
    if out is None:
        out = outputs.new_empty((batch, heads, head_dim))
    if out.shape != outputs.shape[1:] or out.dtype != outputs.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not contiguous {outputs.dtype} [B, H, D]")
    lse = lses.new_empty((batch, heads)) if return_lse else None
    if rows == 0:
        return out, lse
    launch = launch or combine_launch(outputs.numel() * outputs.itemsize, ranks)
    width = _width(head_dim)
    block = launch.block(width, outputs.itemsize)
    _combine_kernel[(triton.cdiv(rows * (head_dim // width), block),)](
        outputs,
        lses,
        out,
        lse,
        rows,
        outputs.stride(0),
        lses.stride(0),
        RANKS=ranks,
        GROUP=min(ranks, 8),
        SEGMENTS=head_dim // width,
        WIDTH=width,
        BLOCK=block,
        BASE_E=base == "e",
        WRITE_LSE=return_lse,
        num_warps=launch.warps,
    )
    return out, lse


def _width(head_dim: int) -> int:
    """Elements in a segment: the largest power of two that divides the head size, at most 128."""
    return math.gcd(head_dim, 128)


def _check_exchange(outputs: torch.Tensor, lses: torch.Tensor) -> None:
    if outputs.dtype not in _BITS or lses.dtype != torch.float32:
        raise ValueError(f"outputs are {outputs.dtype} and lses {lses.dtype}, not bf16, fp16 or fp32, and fp32")
    if outputs.shape[:-1] != lses.shape or not len(lses):
        raise ValueError(f"outputs {tuple(outputs.shape)} and lses {tuple(lses.shape)} are not [N, B, H, D], [N, B, H]")
    if not (outputs[0].is_contiguous() and lses[0].is_contiguous()):
        raise ValueError("outputs and lses must be contiguous within each rank")


def _check_mask(lengths: torch.Tensor | None, query_start_loc: torch.Tensor | None, batch: int) -> int:
    """How many sequences a mask describes; 0 without sequences."""
    if query_start_loc is not None and lengths is None:
        raise ValueError("query_start_loc without lengths: both are needed to tell an empty shard")
    if lengths is None:
        return 0
    if query_start_loc is None:
        if lengths.shape != (batch,):
            raise ValueError(f"lengths {tuple(lengths.shape)} do not give one local length to each of {batch} tokens")
        return 0
    if query_start_loc.shape != (len(lengths) + 1,):
        raise ValueError(f"query_start_loc {tuple(query_start_loc.shape)} does not bound {len(lengths)} sequences")
    return len(lengths)

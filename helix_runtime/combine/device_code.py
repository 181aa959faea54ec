"""The code of the two kernels that `kernels` launches.

A row of D elements is cut into segments of WIDTH elements, the largest power of two that divides D (at most 128), so
that head sizes such as 96, 192 or 576 waste no lane. A program handles BLOCK segments, which are neighbours in the
exchange buffer, whatever rows they belong to. Offsets that can pass 2**31 are 64-bit; the rest stay cheap.

PDL (programmatic dependent launch, Hopper and later): a kernel is started while the one before it on the stream still
runs, computes its addresses, and waits for that one's memory before its first access.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pack_kernel(
    out_ptr,
    lse_ptr,
    send_out_ptr,
    send_lse_ptr,
    lengths_ptr,
    starts_ptr,
    peers_ptr,
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
    lse_offset,
    HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    DIRECT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy BLOCK segments of one destination. MASK: 0 none, 1 a length per row, 2 a length per sequence.

    DIRECT: the chunk of rank n goes to the address peers[n], its LSEs lse_offset bytes behind it.
    """
    rank = tl.program_id(1)
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = segment // SEGMENTS
    inside = row < rows
    part = (segment % SEGMENTS) * WIDTH
    token = (row // HEADS).to(tl.int64)
    head = rank * HEADS + row % HEADS
    column = tl.arange(0, WIDTH)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

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
    if DIRECT:
        address = tl.multiple_of(tl.load(peers_ptr + rank), 128)
        send_out = address.to(tl.pointer_type(send_out_ptr.dtype.element_ty))
        send_lse = (address + lse_offset).to(tl.pointer_type(tl.float32))
    else:
        send_out = send_out_ptr + rank.to(tl.int64) * send_out_stride
        send_lse = send_lse_ptr + rank.to(tl.int64) * send_lse_stride
    target = send_out + segment.to(tl.int64)[:, None] * WIDTH
    tl.store(target + column[None, :], bits, mask=inside[:, None])
    first = inside & (part == 0)
    tl.store(send_lse + row, lse, mask=first)


@triton.jit
def combine_kernel(
    outputs_ptr,
    lses_ptr,
    merged_ptr,
    merged_lse_ptr,
    rows,
    outputs_stride,
    lses_stride,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BASE_E: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BARRIER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge RANKS partials of BLOCK segments, held in registers all at once."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = segment // SEGMENTS
    inside = row < rows
    offset = segment.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    outputs_step = tl.cast(outputs_stride, tl.int64)
    lses_step = tl.cast(lses_stride, tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    # The barrier keeps the compiler from sinking the wide loads to their uses, behind the wait for the LSEs: all loads
    # wait for memory together. Without it a small batch pays the latency of memory twice.
    partials = ()
    for rank in tl.static_range(RANKS):
        partials += (tl.load(outputs_ptr + rank * outputs_step + offset, mask=inside[:, None], other=0.0),)
    if BARRIER:
        tl.debug_barrier()
    lses = ()
    for rank in tl.static_range(RANKS):
        lses += (tl.load(lses_ptr + rank * lses_step + row, mask=inside, other=-float("inf")),)

    top = lses[0]
    for rank in tl.static_range(1, RANKS):
        top = tl.maximum(top, lses[rank])  # passes NaN by, which then reaches the sums as a weight
    # Rows without any live partial subtract 0: -inf - -inf would be NaN.
    top = tl.where(top == -float("inf"), 0.0, top)

    scale: tl.constexpr = 1.4426950408889634 if BASE_E else 1.0  # the weights are powers of two
    total = tl.full([BLOCK], 0.0, tl.float32)
    merged = tl.full([BLOCK, WIDTH], 0.0, tl.float32)
    for rank in tl.static_range(RANKS):
        weight = tl.exp2((lses[rank] - top) * scale)
        live = lses[rank] != -float("inf")
        merged += tl.where(live[:, None], partials[rank].to(tl.float32), 0.0) * weight[:, None]
        total += weight
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(merged_ptr + offset, merged.to(merged_ptr.dtype.element_ty), mask=inside[:, None])
    if WRITE_LSE:
        lse = tl.log(total) + (top if BASE_E else top * 0.6931471805599453)  # log(0) is -inf
        tl.store(merged_lse_ptr + row, lse, mask=inside & (segment % SEGMENTS == 0))

"""Which rows of an attention that still runs are done: its programs count, and a kernel on another stream waits.

So one launch serves a whole batch, and what follows a micro-batch of its rows (join and exchange) starts as soon as
these are done, without the attention being cut into launches, each of which would drain the GPU.

Programs start in the order of their rows, so rows are done about in order, and whoever waits for them in order waits
little longer than it must. Everything can be captured in a CUDA graph, where attention and waits are branches of their
own: the driver must run both at the same time, which it does as long as it has a queue for each (seen on an H200;
nothing in CUDA promises it).
"""

import torch
import triton
import triton.language as tl


def counters(rows: int, device: torch.device | str) -> torch.Tensor:
    """int32 [rows], 0: for one attention at a time. Waiting for every row leaves them 0 again, for the next step.

    They must be 0 when an attention starts. Where a step that is not captured raises after its attention was launched,
    rows that nothing waited for keep their counts: synchronise and `zero_()` them, or take new ones, before the next.
    """
    return torch.zeros(rows, dtype=torch.int32, device=device)


def wait_for(done: torch.Tensor, programs: int) -> None:
    """What follows on the current stream comes after `programs` programs of every row; these counters become 0.

    done: the rows' part of `counters`, contiguous. programs: splits * KV heads of the attention that counts. That
    attention must have been launched before this is called, on another stream or earlier on this one, and must not
    itself come after this stream: the wait holds a place on the GPU until the attention ends. Each row is waited for
    once a step; without an attention that counts, it never ends. On CPU (Triton's interpreter) the same.
    """
    rows = len(done)
    if rows == 0:
        return
    # At least a warp wide: every lane has a counter of its own.
    wait_kernel[(1,)](done, rows, programs, ROWS=max(32, triton.next_power_of_2(rows)), num_warps=1)


@triton.jit
def count_done(done_ptr, row):
    """Called at the end of a program: all its threads' stores are visible to whoever sees `row`'s counter raised."""
    tl.debug_barrier()  # the release below is one thread's, and covers the stores of those that met it here
    tl.atomic_add(done_ptr + row, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["rows", "programs"])
def wait_kernel(done_ptr, rows, programs, ROWS: tl.constexpr):
    """Spin until `rows` counters are `programs`, then set them to 0. One warp: it holds no more of the GPU."""
    row = tl.arange(0, ROWS)
    there = row < rows
    missing = rows
    while missing > 0:
        count = tl.atomic_add(done_ptr + row, 0, mask=there, sem="acquire", scope="gpu")
        missing = tl.sum((there & (count < programs)).to(tl.int32), 0)
    tl.store(done_ptr + row, tl.zeros([ROWS], tl.int32), mask=there)

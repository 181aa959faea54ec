"""One kernel that counts a step's tokens for the proof of path: a step pays one launch, not twenty.

In plain torch the same count takes 0.25 ms of an H100 and of the host that launches it (`benchmarks/proof_cost.py`),
which is more than 1 % of a step of 25 ms.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _count(
    slots_ptr,
    starts_ptr,
    positions_ptr,
    values_ptr,
    rows,
    requests,
    kvp,
    kvp_rank,
    interleave,
    LOCAL: tl.constexpr,
    GLOBAL: tl.constexpr,
    MISPLACED: tl.constexpr,
    EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.load(starts_ptr + requests).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    local = tl.zeros((BLOCK,), tl.int64)
    misplaced = tl.zeros((BLOCK,), tl.int64)
    empty = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, rows, BLOCK):
        row = first + lane
        inside = row < rows
        mine = tl.load(slots_ptr + row, mask=inside, other=-1) >= 0
        position = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.int64)
        owned = (position // interleave) % kvp == kvp_rank
        local += mine.to(tl.int64)
        misplaced += ((mine != owned) & (row < total)).to(tl.int64)
    for first in range(0, requests, BLOCK):
        request = first + lane
        inside = request < requests
        start = tl.load(starts_ptr + request, mask=inside, other=0).to(tl.int64)
        end = tl.load(starts_ptr + request + 1, mask=inside, other=0).to(tl.int64)
        alive = inside & (end > start)
        last = tl.load(positions_ptr + tl.maximum(end - 1, 0), mask=alive, other=0).to(tl.int64)
        # Rank k's shard of a sequence is empty if and only if its length is at most interleave * k.
        empty += (alive & (last < interleave * kvp_rank)).to(tl.int64)
    tl.store(values_ptr + LOCAL, tl.load(values_ptr + LOCAL) + tl.sum(local, 0))
    tl.store(values_ptr + GLOBAL, tl.load(values_ptr + GLOBAL) + total)
    tl.store(values_ptr + MISPLACED, tl.load(values_ptr + MISPLACED) + tl.sum(misplaced, 0))
    tl.store(values_ptr + EMPTY, tl.load(values_ptr + EMPTY) + tl.sum(empty, 0))


def count(
    values: torch.Tensor,
    names: tuple[str, ...],
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    *,
    kvp: int,
    kvp_rank: int,
    interleave: int,
) -> None:
    """Add one step's tokens to the counters `values` (int64, called `names`), all on one device; waits for nothing.

    slots: [T or more], -1 for what another rank owns and for padding. query_start_loc: [R + 1 or more], the rest equal
    to the number of real tokens. positions: [T or more], of each token in its own sequence. Integer, contiguous.
    """
    index = {name: names.index(name) for name in ("local_tokens", "global_tokens", "misplaced_tokens", "empty_shard")}
    _count[(1,)](
        slots, query_start_loc, positions, values, len(slots), len(query_start_loc) - 1, kvp, kvp_rank, interleave,
        LOCAL=index["local_tokens"], GLOBAL=index["global_tokens"], MISPLACED=index["misplaced_tokens"],
        EMPTY=index["empty_shard"], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip

"""Which KVP rank owns which token of a sequence, and where in its paged shard the token lies.

Tokens are dealt to the `kvp` ranks of a KVP group in runs of `interleave` (vLLM: `--cp-kv-cache-interleave-size`),
so position p of a sequence belongs to rank `(p // interleave) % kvp`. Rank k's first token is position
`interleave * k`, from which the rule of the empty shard follows:

    rank k's shard of a sequence is empty if and only if length <= interleave * k.

Every request shorter than `interleave * (kvp - 1) + 1` tokens therefore has empty shards; they are ordinary.

A block of the block table is shared by the group: block i holds positions `[i * block_size * kvp, (i + 1) * block_size
* kvp)`, of which each rank stores its own `block_size`. The block table is thus the same on every rank, and because
`interleave` divides `block_size`, token j of a shard lies in block `j // block_size` at offset `j % block_size`.

The scalar functions need no torch. Positions count from 0 over the whole sequence; lengths are in tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

#: A position or an integer tensor of positions: the arithmetic is the same.
Index = TypeVar("Index", int, "torch.Tensor")

#: The slot of a token that this rank does not store, vLLM's `PAD_SLOT_ID`.
PAD_SLOT = -1


def owner(position: Index, kvp: int, interleave: int = 1) -> Index:
    """The KVP rank that stores the token at `position`; elementwise for a tensor.

    Raises ValueError for a negative int: modulo would name an owner for a token that does not exist.
    """
    if isinstance(position, int) and position < 0:
        raise ValueError(f"position {position} is negative: positions count from 0")
    return (position // interleave) % kvp


def local_index(position: Index, kvp: int, interleave: int = 1) -> Index:
    """The token's index within its owner's shard of the sequence; elementwise for a tensor."""
    if isinstance(position, int) and position < 0:
        raise ValueError(f"position {position} is negative: positions count from 0")
    return position // (interleave * kvp) * interleave + position % interleave


def global_position(index: Index, *, kvp: int, kvp_rank: int, interleave: int = 1) -> Index:
    """The position in the sequence of token `index` of rank `kvp_rank`'s shard; elementwise for a tensor.

    The inverse of `local_index` on the positions that the rank owns; strictly increasing in `index`.
    """
    return index // interleave * (interleave * kvp) + kvp_rank * interleave + index % interleave


def global_positions(local_count: int, *, kvp: int, kvp_rank: int, interleave: int = 1, device=None) -> torch.Tensor:
    """The positions of the first `local_count` tokens of a shard, in storage order: int64 [local_count]."""
    import torch

    index = torch.arange(local_count, dtype=torch.int64, device=device)
    return global_position(index, kvp=kvp, kvp_rank=kvp_rank, interleave=interleave)


def local_length(length: int, kvp: int, kvp_rank: int, interleave: int = 1) -> int:
    """How many of a sequence's first `length` tokens rank `kvp_rank` stores. 0 iff length <= interleave * kvp_rank.

    Raises ValueError for a negative length, or a rank outside [0, kvp).
    """
    _check(kvp, kvp_rank, interleave)
    if length < 0:
        raise ValueError(f"length {length} is negative")
    rounds, rest = divmod(length, interleave * kvp)
    return rounds * interleave + min(max(rest - interleave * kvp_rank, 0), interleave)


def local_lengths(lengths: torch.Tensor, kvp: int, kvp_rank: int, interleave: int = 1) -> torch.Tensor:
    """`local_length` of every element of an integer tensor, in its shape and dtype."""
    _check(kvp, kvp_rank, interleave)
    rounds = lengths // (interleave * kvp)
    rest = lengths - rounds * (interleave * kvp)
    return rounds * interleave + (rest - interleave * kvp_rank).clamp(0, interleave)


def slot_mapping(
    positions: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    block_size: int,
    kvp: int,
    kvp_rank: int,
    interleave: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cache slot, `block * block_size + offset`, into which this rank writes each token of a batch.

    positions: integer [T], of each token in its own sequence; block_table: integer [R, max_blocks]; query_start_loc:
    integer [R + 1], the tokens `[query_start_loc[r], query_start_loc[r + 1])` belong to request r. Returns int64 [T]
    (or fills `out`, which may be longer): PAD_SLOT for a token of another rank, for a negative position and for
    every token past the last request. vLLM does the same in `vllm/v1/worker/block_table.py`
    (`ComputeSlotMappingKernel`).

    Raises ValueError if `interleave` does not divide `block_size`, IndexError if a block table row is too short.
    """
    import torch

    _check(kvp, kvp_rank, interleave)
    if block_size % interleave:
        raise ValueError(f"interleave {interleave} does not divide the block size {block_size}")
    if out is None:
        out = torch.empty(positions.shape[0], dtype=torch.int64, device=positions.device)
    out.fill_(PAD_SLOT)
    counts = query_start_loc.diff().to(torch.int64)
    request = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    positions = positions[: request.shape[0]].to(torch.int64)
    mine = (owner(positions, kvp, interleave) == kvp_rank) & (positions >= 0)
    index = local_index(positions[mine], kvp, interleave)
    block = block_table[request[mine], index // block_size].to(torch.int64)
    out[: request.shape[0]][mine] = block * block_size + index % block_size
    return out


def misplaced(
    slots: torch.Tensor, positions: torch.Tensor, *, kvp: int, kvp_rank: int, interleave: int = 1
) -> torch.Tensor:
    """Which tokens, [T] bool, are written here though another rank owns their position, or owned and not written.

    slots: [T], PAD_SLOT where this rank writes nothing; positions: [T], of each token in its own sequence. No padding.
    """
    return (slots != PAD_SLOT) != (owner(positions, kvp, interleave) == kvp_rank)


def _check(kvp: int, kvp_rank: int, interleave: int) -> None:
    if kvp < 1 or not 0 <= kvp_rank < kvp:
        raise ValueError(f"kvp_rank {kvp_rank} is not one of the {kvp} ranks 0..{kvp - 1}")
    if interleave < 1:
        raise ValueError(f"interleave {interleave} is not at least 1")

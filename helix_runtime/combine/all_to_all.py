"""Combine by one All-to-All: each rank sends every peer that peer's heads, and merges what it gets for its own.

Output and LSE travel in one collective. The message for a peer is a row of bytes: the LSEs, then the outputs, rounded
up to ALIGN bytes so that every row starts aligned whatever the head size is:

    [ B * H/N lse, fp32 | B * H/N * D output, its own dtype | zeros ]

Bytes are copied, never converted: a bf16 output and its fp32 LSE both arrive exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from helix_runtime.combine.collectives import DIST, Collectives
from helix_runtime.combine.merge import LseBase, accumulate_dtype, check_lse_dtype, merge_partials

ALIGN = 16

Merge = Callable[[torch.Tensor, torch.Tensor, LseBase], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Message:
    """Layout of what one rank sends one peer. `heads` counts the peer's heads, H / N; `dtype` is the output's."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def lse_dtype(self) -> torch.dtype:
        """fp32, or fp64 beside fp64 outputs."""
        return accumulate_dtype(self.dtype)

    @property
    def lse_bytes(self) -> int:
        return self.tokens * self.heads * self.lse_dtype.itemsize

    @property
    def used_bytes(self) -> int:
        return self.lse_bytes + self.tokens * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """At least ALIGN: an empty batch is exchanged like any other."""
        return -(-max(self.used_bytes, 1) // ALIGN) * ALIGN

    def pack(self, output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """uint8 [N, bytes] from output [B, H, D] and lse [B, H]: row i holds heads [i * H/N, (i + 1) * H/N)."""
        members = output.shape[1] // self.heads
        packed = torch.empty(members, self.bytes, dtype=torch.uint8, device=output.device)
        packed[:, self.used_bytes :] = 0
        outputs, lses = self.unpack(packed)
        outputs.copy_(output.unflatten(1, (members, self.heads)).transpose(0, 1))
        lses.copy_(lse.unflatten(1, (members, self.heads)).transpose(0, 1))
        return packed

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (outputs [N, B, H/N, D], lses [N, B, H/N]) into uint8 [N, bytes]; writing to them writes there."""
        lses = packed[:, : self.lse_bytes].view(self.lse_dtype)
        outputs = packed[:, self.lse_bytes : self.used_bytes].view(self.dtype)
        shape = (self.tokens, self.heads)
        return outputs.unflatten(1, (*shape, self.head_dim)), lses.unflatten(1, shape)


def all_to_all_combine(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    lse_base: LseBase = "e",
    return_lse: bool = False,
    collectives: Collectives = DIST,
    merge: Merge = merge_partials,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge the group's partials and shard the result by heads, with one All-to-All.

    partial_output: [B, H, D], this rank's partial of all H heads (H = Q / TPA) over its KV shard; partial_lse: [B, H],
    fp32, of base `lse_base`, -inf for an empty shard. Every member of `group` passes the same shapes, B = 0 included.
    Member i, in group-rank order, gets heads [i * H/N, (i + 1) * H/N): the heads of its ordinary `o_proj` shard.

    Returns output [B, H/N, D] in the dtype of partial_output, and with `return_lse` also their merged lse [B, H/N],
    natural log, fp32 (fp64 for fp64 outputs). `merge` is given all members' partials of these heads, in group order.

    Raises ValueError if H is not a multiple of N, or for an lse below fp32. Source: Helix paper
    (arXiv 2507.07120), section 2.1.1.
    """
    members = dist.get_world_size(group)
    heads = heads_per_member(partial_output, partial_lse, members)
    message = Message(partial_output.shape[0], heads, partial_output.shape[2], partial_output.dtype)
    if members == 1:
        outputs, lses = partial_output[None], partial_lse[None]
    else:
        sent = message.pack(partial_output, partial_lse)
        received = torch.empty_like(sent)
        collectives.all_to_all(received, sent, group=group)
        outputs, lses = message.unpack(received)
    output, lse = merge(outputs, lses, lse_base)
    return (output, lse) if return_lse else output


def heads_per_member(partial_output: torch.Tensor, partial_lse: torch.Tensor, members: int) -> int:
    """H / N. Raises ValueError unless shapes are [B, H, D] and [B, H], the lse is fp32 or fp64, and N divides H."""
    if partial_output.ndim != 3 or partial_output.shape[:2] != partial_lse.shape:
        shapes = f"{tuple(partial_output.shape)} and {tuple(partial_lse.shape)}"
        raise ValueError(f"partial output and lse are {shapes}, not [B, H, D] and [B, H]")
    check_lse_dtype(partial_lse)
    if partial_output.shape[1] % members:
        raise ValueError(f"{partial_output.shape[1]} heads cannot be dealt to {members} group members: not a multiple")
    return partial_output.shape[1] // members

"""Combine by AllGather + ReduceScatter: gather the LSEs, scale the own partial, sum over ranks and deal out heads."""

import torch
import torch.distributed as dist

from helix_runtime.combine.all_to_all import heads_per_member
from helix_runtime.combine.collectives import DIST, Collectives
from helix_runtime.combine.merge import LseBase, accumulate_dtype, natural, scale_partial


def all_gather_reduce_scatter_combine(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    lse_base: LseBase = "e",
    return_lse: bool = False,
    collectives: Collectives = DIST,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge the group's partials and shard the result by heads: the standard way, in two collectives.

    Arguments, results and errors as `all_to_all_combine`. Shares are scaled and summed in fp32 (fp64 for fp64 outputs)
    and rounded once at the end; the order of the sum is the transport's, so the last bits may differ from those of
    `all_to_all_combine`.
    """
    members, rank = dist.get_world_size(group), dist.get_rank(group)
    heads = heads_per_member(partial_output, partial_lse, members)
    tokens, _, head_dim = partial_output.shape
    lse = natural(partial_lse, lse_base, accumulate_dtype(partial_output.dtype)).contiguous()
    lses = lse.new_empty(members, *lse.shape)
    if members == 1:
        lses[0] = lse
    else:
        collectives.all_gather(lses, lse, group=group)
    share, merged_lse = scale_partial(partial_output, lses, rank)
    if members == 1:
        output = share
    else:
        by_member = share.unflatten(1, (members, heads)).transpose(0, 1).contiguous()
        output = share.new_empty(tokens, heads, head_dim)
        collectives.reduce_scatter(output, by_member, group=group)
    output = output.to(partial_output.dtype)
    return (output, merged_lse[:, rank * heads : (rank + 1) * heads]) if return_lse else output

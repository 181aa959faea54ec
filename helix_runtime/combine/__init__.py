"""The combine: the exact merge of partials over a KVP group, which leaves each rank the heads of its `o_proj` shard."""

from typing import Protocol

import torch
import torch.distributed as dist

from helix_runtime.combine.all_to_all import Message, all_to_all_combine
from helix_runtime.combine.collectives import DIST, Collectives, Exchange
from helix_runtime.combine.gather_scatter import all_gather_reduce_scatter_combine
from helix_runtime.combine.merge import LseBase, merge_partials


class Combine(Protocol):
    """(partial output [B, H, D], lse [B, H]) of one rank -> output [B, H/N, D], and the lse [B, H/N] if asked for."""

    def __call__(
        self,
        partial_output: torch.Tensor,
        partial_lse: torch.Tensor,
        group: dist.ProcessGroup,
        *,
        lse_base: LseBase = "e",
        return_lse: bool = False,
        collectives: Collectives = DIST,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


#: By the name that vLLM gives the exchange (`--dcp-comm-backend`).
COMBINES: dict[str, Combine] = {"a2a": all_to_all_combine, "ag_rs": all_gather_reduce_scatter_combine}

__all__ = [
    "COMBINES",
    "DIST",
    "Collectives",
    "Combine",
    "Exchange",
    "LseBase",
    "Message",
    "all_gather_reduce_scatter_combine",
    "all_to_all_combine",
    "merge_partials",
]

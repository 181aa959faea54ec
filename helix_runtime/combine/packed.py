"""The All-to-All combine on a GPU: one Triton kernel packs, one collective moves, one Triton kernel merges.

Send and receive buffers are static (`Workspace`), nothing waits for the device, and with a transport that can be
captured (NCCL) the whole is captured in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from helix_runtime.combine import kernels
from helix_runtime.combine.all_to_all import heads_per_member
from helix_runtime.combine.collectives import DIST, Exchange
from helix_runtime.combine.merge import LseBase
from helix_runtime.combine.workspace import PackedLayout, Workspace


@dataclass(frozen=True)
class PackedCombine:
    """`all_to_all_combine` by our kernels, for one group. Exchanges that overlap each need a `lane` of their own.

    exchange moves uint8 [N, chunk bytes]: row i goes to, or came from, member i of the group.
    """

    group: dist.ProcessGroup
    workspace: Workspace
    exchange: Exchange = DIST.all_to_all
    name = "triton"

    def __call__(
        self,
        partial_output: torch.Tensor,
        partial_lse: torch.Tensor,
        *,
        lse_base: LseBase = "e",
        return_lse: bool = False,
        lengths: torch.Tensor | None = None,
        query_start_loc: torch.Tensor | None = None,
        lane: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Arguments and results as `all_to_all_combine`; `lengths` and `query_start_loc` as `kernels.pack`: rows of
        empty shards are emptied whatever attention left there."""
        members = dist.get_world_size(self.group)
        heads_per_member(partial_output, partial_lse, members)
        layout = PackedLayout.of(partial_output, members)
        mask = {"lengths": lengths, "query_start_loc": query_start_loc}

        def fill(outputs: torch.Tensor, lses: torch.Tensor) -> None:
            kernels.pack(partial_output, partial_lse, outputs, lses, **mask)

        output, lse = self.filled(layout, fill, lse_base, return_lse, lane)
        return (output, lse) if return_lse else output

    def filled(
        self,
        layout: PackedLayout,
        fill: Callable[[torch.Tensor, torch.Tensor], None],
        lse_base: LseBase = "e",
        return_lse: bool = False,
        lane: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same where `fill` writes the partials into the send buffer itself, outputs [N, B, H, D] and lses
        [N, B, H]: attention that can write there needs no pack (`send` of the decode kernels)."""
        return self.moved(layout, self.sent(layout, fill, lane), lse_base, return_lse, lane)

    def sent(
        self, layout: PackedLayout, fill: Callable[[torch.Tensor, torch.Tensor], None], lane: int = 0
    ) -> torch.Tensor:
        """The first half of `filled`, which may run on another stream: the send buffer of `lane`, filled."""
        sent = self.workspace.buffer(f"send {lane}", layout.nbytes)
        fill(layout.outputs(sent), layout.lses(sent))
        return sent

    def moved(
        self,
        layout: PackedLayout,
        sent: torch.Tensor,
        lse_base: LseBase = "e",
        return_lse: bool = False,
        lane: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The second half: moves what `sent` returned, and merges what came."""
        received = sent
        if layout.ranks > 1:
            received = self.workspace.buffer(f"receive {lane}", layout.nbytes)
            self.exchange(received.view(layout.ranks, -1), sent.view(layout.ranks, -1), group=self.group)
        return kernels.combine(layout.outputs(received), layout.lses(received), lse_base, return_lse=return_lse)

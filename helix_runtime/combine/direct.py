"""The All-to-All combine over symmetric memory: the pack kernel writes each peer's chunk into that peer's memory.

For ranks on one host whose GPUs reach each other's memory (NVLink). No multicast is used. One exchange is: a barrier
(every peer has merged what lay in its buffer before), pack into the peers' buffers, a barrier (all chunks have
arrived), merge. Both barriers are kernels on the stream, so that nothing waits on the host and a CUDA graph can hold
it, whatever the number of exchanges in the graph.
"""

import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from helix_runtime.combine import kernels
from helix_runtime.combine.all_to_all import heads_per_member
from helix_runtime.combine.merge import LseBase
from helix_runtime.combine.workspace import PackedLayout


class DirectUnavailable(RuntimeError):
    """Why the ranks of a group cannot write into each other's memory; raised on every rank alike."""


@dataclass
class _Lane:
    """One receive buffer on every rank: ours, the handle of all, and where our chunk starts in each peer's buffer."""

    buffer: torch.Tensor
    handle: object
    peers: dict[int, torch.Tensor] = field(default_factory=dict)  # chunk bytes -> int64 [N] addresses


class DirectCombine:
    """As `PackedCombine`, without a collective. Raises DirectUnavailable where the group's GPUs are not peers."""

    name = "direct"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int = 1 << 20):
        self.group, self.device = group, torch.device(device)
        self.rank, self.members = dist.get_rank(group), dist.get_world_size(group)
        self._lanes: dict[int, _Lane] = {}
        self._retired: list[_Lane] = []  # a captured graph may still write there
        _require_peers(group, self.device)
        problem = None
        try:
            self._lane(0, nbytes)
        except Exception as error:  # whatever symmetric memory objects to is a reason to fall back
            problem = f"symmetric memory: {type(error).__name__}: {error}"
        _agree(group, problem)

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
        """Arguments and results as `PackedCombine`. A larger exchange than before grows the buffers of all ranks,
        which all make alike because all exchange the same shapes; not while a CUDA graph is captured (RuntimeError).
        """
        heads_per_member(partial_output, partial_lse, self.members)
        layout = PackedLayout.of(partial_output, self.members)
        held = self._lane(lane, layout.nbytes)
        outputs, lses = layout.outputs(held.buffer), layout.lses(held.buffer)
        held.handle.barrier(channel=2 * (lane % 4))
        mask = {"lengths": lengths, "query_start_loc": query_start_loc}
        kernels.pack(
            partial_output, partial_lse, outputs, lses, peers=self._addresses(held, layout.chunk_bytes), **mask
        )
        held.handle.barrier(channel=2 * (lane % 4) + 1)
        output, lse = kernels.combine(outputs, lses, lse_base, return_lse=return_lse)
        return (output, lse) if return_lse else output

    def _lane(self, lane: int, nbytes: int) -> _Lane:
        held = self._lanes.get(lane)
        if held is not None and held.buffer.numel() >= nbytes:
            return held
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"an exchange of {nbytes} bytes must run once before it is captured in a CUDA graph")
        import torch.distributed._symmetric_memory as symmetric_memory

        size = -(-max(nbytes, 2 * held.buffer.numel() if held else 0) // 4096) * 4096
        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        handle = symmetric_memory.rendezvous(buffer, self.group.group_name)
        if held is not None:
            self._retired.append(held)
        self._lanes[lane] = _Lane(buffer, handle)
        return self._lanes[lane]

    def _addresses(self, held: _Lane, chunk_bytes: int) -> torch.Tensor:
        """int64 [N]: where this rank's chunk starts in every member's buffer, on the device."""
        if chunk_bytes not in held.peers:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("an exchange must run once in its size before it is captured in a CUDA graph")
            starts = [pointer + self.rank * chunk_bytes for pointer in held.handle.buffer_ptrs]
            held.peers[chunk_bytes] = torch.tensor(starts, dtype=torch.int64, device=self.device)
        return held.peers[chunk_bytes]


def _require_peers(group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises DirectUnavailable on every rank unless all are on one host, on GPUs of their own that are peers."""
    if device.type != "cuda":
        raise DirectUnavailable(f"direct exchange needs GPUs, not {device.type}")
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    problem = None
    if len({host for host, _ in found}) > 1:
        problem = "the ranks are on several hosts"
    elif len(set(found)) < len(found) and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
        problem = "ranks share a GPU"
    else:
        visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        for _, uuid in found:
            peer = visible.get(uuid, device.index)
            if peer != device.index and not torch.cuda.can_device_access_peer(device.index, peer):
                problem = f"GPU {device.index} cannot reach the memory of GPU {peer}"
    _agree(group, problem)


def _agree(group: dist.ProcessGroup, problem: str | None) -> None:
    """Raises DirectUnavailable on every rank if any has a problem, so that all fall back together."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, problem, group=group)
    for rank, each in enumerate(found):
        if each is not None:
            raise DirectUnavailable(f"rank {rank}: {each}")

"""The exchanges that are measured against each other, each as `make(here, case, vllm) -> call(output, lse) -> merged`.

Ours: `packed` (our kernels around an All-to-All), `direct` (our kernels over symmetric memory), `torch` and `ag_rs` in
plain torch. vLLM's: `vllm_a2a`, `vllm_ag_rs` through torch's collectives, and `vllm_direct`, which it chooses itself
for MLA between the GPUs of one host. Bare collectives of the same sizes are what the planner's links are fitted to.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.cases import Case
from benchmarks.ranks import Here
from benchmarks.vllm_ops import VllmOps
from helix_runtime.combine import all_gather_reduce_scatter_combine, all_to_all_combine

Exchange = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TorchGroup:
    """What vLLM's functions ask of its own group of ranks, through `torch.distributed` alone."""

    def __init__(self, here: Here):
        self.device_group, self.world_size, self.rank_in_group = here.group, here.ranks, here.rank

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        assert dim == 0, dim
        gathered = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather(list(gathered.chunk(self.world_size)), tensor.contiguous(), group=self.device_group)
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = tensor.movedim(dim, 0).contiguous()
        mine = parts.new_empty(parts.shape[0] // self.world_size, *parts.shape[1:])
        dist.reduce_scatter(mine, list(parts.chunk(self.world_size)), group=self.device_group)
        return mine.movedim(0, dim).contiguous()


def _packed(here: Here, case: Case, vllm: VllmOps | None) -> Exchange:
    from helix_runtime.combine.packed import PackedCombine
    from helix_runtime.combine.workspace import Workspace

    _needs_gpu(here)
    return PackedCombine(here.group, Workspace(here.device))


def _direct(here: Here, case: Case, vllm: VllmOps | None) -> Exchange:
    from helix_runtime.combine.direct import DirectCombine

    return DirectCombine(here.group, here.device, case.layout.nbytes)


def _vllm_a2a(here: Here, case: Case, vllm: VllmOps | None) -> Exchange:
    _needs_gpu(here)
    return partial(_installed(vllm).function("dcp_a2a_lse_reduce"), cp_group=TorchGroup(here))


def _vllm_ag_rs(here: Here, case: Case, vllm: VllmOps | None) -> Exchange:
    _needs_gpu(here)
    function = _installed(vllm).function("cp_lse_ag_out_rs", needs_installed=True)
    # It scales the partial in place, as it may in vLLM; here the same partials are measured again.
    return lambda output, lse: function(output, lse, TorchGroup(here))


def _vllm_direct(here: Here, case: Case, vllm: VllmOps | None) -> Exchange:
    _needs_gpu(here)
    workspace = _installed(vllm).function("DirectDCPA2AWorkspace", needs_installed=True)
    importlib.import_module("vllm._custom_ops")  # registers its kernel
    made = workspace(here.group, here.device, case.batch, case.heads, case.head_dim, case.dtype)
    return lambda output, lse: made.lse_reduce(output, lse, True)


def _needs_gpu(here: Here) -> None:
    if not here.cuda:
        raise LookupError(f"needs a CUDA device, not {here.device.type}")


def _installed(vllm: VllmOps | None) -> VllmOps:
    if vllm is None:
        raise LookupError("vLLM is not installed, and no --vllm-ops was given")
    return vllm


SERIES: dict[str, Callable[[Here, Case, VllmOps | None], Exchange]] = {
    "packed": _packed,
    "direct": _direct,
    "ag_rs": lambda here, case, vllm: partial(all_gather_reduce_scatter_combine, group=here.group),
    "torch": lambda here, case, vllm: partial(all_to_all_combine, group=here.group),
    "vllm_a2a": _vllm_a2a,
    "vllm_ag_rs": _vllm_ag_rs,
    "vllm_direct": _vllm_direct,
}
#: Series that write into the partial that they are given.
IN_PLACE = {"vllm_ag_rs"}


def collectives(here: Here, case: Case) -> dict[str, tuple[int, Callable[[torch.Tensor], object]]]:
    """Bare collectives of a case's sizes: operation -> (bytes that one rank sends, call on a partial [B, N * H, D]).

    all_to_all: the packed partials; all_gather: one rank's queries; all_reduce: the outputs of all heads of a token.
    """
    group, ranks, layout = here.group, here.ranks, case.layout
    send = torch.zeros(layout.nbytes, dtype=torch.uint8, device=here.device)
    receive = torch.zeros_like(send)
    own = case.batch * case.heads * case.row_bytes
    query = torch.zeros(case.batch, case.heads, case.head_dim, dtype=case.dtype, device=here.device)
    gathered = torch.zeros(ranks, *query.shape, dtype=case.dtype, device=here.device)

    def all_to_all(partial_output: torch.Tensor) -> None:
        dist.all_to_all_single(receive, send, group=group)

    def all_gather(partial_output: torch.Tensor) -> None:
        dist.all_gather(list(gathered), query, group=group)

    def all_reduce(partial_output: torch.Tensor) -> None:
        dist.all_reduce(partial_output, group=group)

    return {
        "all_to_all": ((ranks - 1) * layout.chunk_bytes, all_to_all),
        "all_gather": ((ranks - 1) * own, all_gather),
        "all_reduce": (2 * (ranks - 1) * own, all_reduce),  # 2 (1 - 1 / N) of the whole
    }

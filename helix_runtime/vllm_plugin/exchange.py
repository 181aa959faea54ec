"""Which combine a worker runs: ours on CPU, where upstream's are Triton kernels, and upstream's on CUDA."""

import torch

from helix_runtime.combine import COMBINES
from helix_runtime.combine.collectives import DIST
from helix_runtime.vllm_plugin.context_parallel import ContextParallel


def combine_of(comm: str, cpu: bool):
    """(what makes the combine of a `ContextParallel`, its name) for `--dcp-comm-backend` `comm`."""
    if cpu:
        function, make = COMBINES[comm], _ours
    else:
        function, make = upstream_combine(comm), _upstream
    return make, f"{function.__module__}.{function.__qualname__}"


def upstream_combine(comm: str):
    """vLLM's own function for a combine: what its attention backends pick themselves."""
    from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce

    return {"a2a": dcp_a2a_lse_reduce, "ag_rs": cp_lse_ag_out_rs}[comm]


def _ours(context: ContextParallel):
    from vllm.distributed.parallel_state import get_dcp_group

    group = get_dcp_group().device_group

    def combine(partial_output: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        fault = context.fault
        partial_output, partial_lse = fault.partial(partial_output, partial_lse, context.site)
        return COMBINES[context.comm](
            partial_output, partial_lse, group, lse_base=fault.lse_base, collectives=fault.collectives(DIST)
        )

    return combine


def _upstream(context: ContextParallel):
    from vllm.distributed.parallel_state import get_dcp_group

    group, function = get_dcp_group(), upstream_combine(context.comm)

    def combine(partial_output: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        return function(partial_output, partial_lse, group)

    return combine

"""Which combine a worker runs: ours on CPU, where upstream's are Triton kernels, and upstream's on CUDA."""

import functools

import torch
import torch.distributed as dist

from helix_runtime.combine import COMBINES
from helix_runtime.combine.collectives import DIST, Collectives, Exchange
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
        fault, site = context.fault, context.site
        partial_output, partial_lse = fault.partial(partial_output, partial_lse, site)
        merged = fault.replaces(partial_output, partial_lse, site, group)
        if merged is None:
            function = COMBINES[context.comm]
            if context.comm == "a2a":
                function = functools.partial(function, merge=fault.merge)
            collectives = fault.collectives(counting(context))
            merged = function(partial_output, partial_lse, group, lse_base=fault.lse_base, collectives=collectives)
        return fault.merged(merged, site)

    return combine


def counting(context: ContextParallel) -> Collectives:
    """The real collectives, counted for the proof where they are called: which ran, and among how many members.

    Outside an attention call (the self-test) nothing is counted.
    """

    def counted(exchange: Exchange, name: str) -> Exchange:
        def call(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> None:
            exchange(output, input, group=group)
            if context.site:
                context.proof.count(name)
                context.proof.count("exchange_members", dist.get_world_size(group))

        return call

    return Collectives(
        all_to_all=counted(DIST.all_to_all, "all_to_all"),
        all_gather=counted(DIST.all_gather, "all_gather"),
        reduce_scatter=counted(DIST.reduce_scatter, "reduce_scatter"),
    )


def _upstream(context: ContextParallel):
    from vllm.distributed.parallel_state import get_dcp_group

    group, function = get_dcp_group(), upstream_combine(context.comm)

    def combine(partial_output: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        return function(partial_output, partial_lse, group)

    return combine

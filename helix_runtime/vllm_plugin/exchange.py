"""Which combine a worker runs: ours in torch on CPU, where upstream's are Triton kernels; on CUDA upstream's, or ours.

Why: `helix.combine` of `triton` or `direct` puts our kernels in the place of vLLM's `a2a` combine, for every backend.
Hook: `dcp_a2a_lse_reduce`, in the module that defines it and in the backends that import it by name.
Upstream: vllm `v1/attention/ops/dcp.py`.
Remove when: upstream's kernels are as fast.
"""

import dataclasses
import functools
import importlib.util
import logging
import math
import os

import torch
import torch.distributed as dist

from helix_runtime.combine import COMBINES
from helix_runtime.combine.collectives import DIST, Collectives, Exchange
from helix_runtime.combine.select import Chosen, choose
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import ContextParallel
from helix_runtime.vllm_plugin.options import HelixOptions

log = logging.getLogger(__name__)

#: Where `auto` is ours: Helix GQA on this backend between GPUs, eager or in these modes of CUDA graphs. Ours is faster
#: than vLLM's `a2a` there (benchmarks/README.md), and cells have judged it inside vLLM (reports/2026-11-26-h200-x4).
#: For MLA vLLM has a direct exchange of its own, about as fast.
OURS_BY_DEFAULT, IN_MODES = ("FLASH_ATTN",), (None, "NONE", "FULL_AND_PIECEWISE")
_OURS_ON_CUDA = ("triton", "direct")


def combine_of(comm: str, cpu: bool, wanted: str = "auto"):
    """(what makes the combine of a `ContextParallel`, its name) for `--dcp-comm-backend` `comm` and `helix.combine`.

    What cannot run here is replaced by what can, with a warning, and the name says so: it goes into the proof of path.
    """
    if wanted == "auto":
        wanted = "torch" if cpu else "upstream"
    if not cpu and comm == "a2a" and wanted in _OURS_ON_CUDA:
        return (lambda context: _kernels(wanted)), f"helix_runtime.combine.{_chosen(wanted).name}"
    function, make = (COMBINES[comm], _ours) if cpu else (upstream_combine(comm), _upstream)
    name = f"{function.__module__}.{function.__qualname__}"
    if wanted != ("torch" if cpu else "upstream"):
        why = f"there is no {wanted!r} on {'CPU' if cpu else 'CUDA'}" if comm == "a2a" else f"{comm} has only this one"
        name = f"{name} (fell back: {why})"
        log.warning("helix.combine runs %s", name)
    return make, name


def meant_on_cuda(
    options: HelixOptions, use_mla: bool, backend: str | None, comm: str | None, graph_mode: str | None
) -> HelixOptions:
    """`options` with what `combine: auto` means for this server; `direct` falls back where GPUs are not peers.

    graph_mode: vLLM's name of the mode of CUDA graphs; None for its default.
    """
    if options.combine != "auto":
        return options
    ours = options.helix_mode and not use_mla and backend in OURS_BY_DEFAULT and comm == "a2a"
    ours = ours and not options.share_gpu and graph_mode in IN_MODES
    return dataclasses.replace(options, combine="direct" if ours else "upstream")


def install_on_cuda(wanted: str) -> None:
    """Put ours in the place of vLLM's `a2a` combine, if it was asked for."""
    if wanted not in _OURS_ON_CUDA:
        return
    os.environ["VLLM_USE_DIRECT_DCP_A2A"] = "0"  # would bypass the function that we replace
    modules = ["vllm.v1.attention.ops.dcp", "vllm.v1.attention.backends.flash_attn"]
    if importlib.util.find_spec("flashinfer"):
        modules.append("vllm.v1.attention.backends.flashinfer")
    for module in modules:
        patch(f"{module}:dcp_a2a_lse_reduce", lambda original: _replacement(original, wanted))


def _replacement(original, wanted: str):
    def dcp_a2a_lse_reduce(
        cp_attn_out,
        cp_attn_lse,
        cp_group,
        ctx=None,
        return_lse=False,
        is_lse_base_on_e=True,
        seq_lens=None,
        query_start_loc=None,
    ):
        """vLLM's own contract: with base 2 the lse goes out in base 2 as well."""
        if cp_group.world_size == 1 or cp_attn_out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return original(
                cp_attn_out, cp_attn_lse, cp_group, ctx, return_lse, is_lse_base_on_e, seq_lens, query_start_loc
            )
        output, lse = _chosen(wanted).combine(
            cp_attn_out,
            cp_attn_lse.float(),
            lse_base="e" if is_lse_base_on_e else "2",
            return_lse=True,
            lengths=seq_lens,
            query_start_loc=query_start_loc,
        )
        if not return_lse:
            return output
        return output, lse if is_lse_base_on_e else lse / math.log(2.0)

    return dcp_a2a_lse_reduce


@functools.cache
def _chosen(wanted: str) -> Chosen:
    """Ours for this worker's KVP group, made once: its buffers are static."""
    from vllm.distributed.parallel_state import get_dcp_group

    group = get_dcp_group()
    return choose(wanted, group.device_group, group.device)


def _kernels(wanted: str):
    def combine(partial_output: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        return _chosen(wanted).combine(partial_output, partial_lse)

    return combine


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

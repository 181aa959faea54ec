"""Proof of path on a GPU: counters on the device, so that replays of CUDA graphs count, and tokens once a step.

Why: Python counters stop when a graph is captured. Nor can tokens be counted where a layer writes them: a graph's batch
is padded, and a padded slot looks like one that another rank owns.
Hook: `Worker.compile_or_warm_up_model`, after which all graphs are captured: what a replay of each adds is copied to
the device, what warming up has counted is forgotten, and the counters are published from there on, with the mode of
CUDA graphs that vLLM settled on.
`BlockTables.compute_slot_mappings` (V2 model runner), which runs once a step, outside any graph, for real batches only,
and whose `query_start_loc` ends with the number of real tokens.
Upstream: vllm `v1/worker/gpu_worker.py`, `v1/worker/gpu/block_table.py`.
Remove when: vLLM reports which combine ran, how often, and which rank holds which tokens.
"""

import torch

from helix_runtime.device_counters import Publisher
from helix_runtime.proof import PUBLISHED
from helix_runtime.sharding import misplaced
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import ContextParallel, current

_V2 = "vllm.v1.worker.gpu.model_runner"


def install() -> None:
    patch("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", _compile_or_warm_up_model)
    patch("vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings", _compute_slot_mappings)


def runs_v2(model_runner: object) -> bool:
    """Whether a worker's model runner is vLLM's second one."""
    return any(cls.__module__ == _V2 for cls in type(model_runner).__mro__)


def _compile_or_warm_up_model(original):
    def compile_or_warm_up_model(self):
        result = original(self)
        proof = current().proof
        if proof.on_device:
            proof.on_device.flush()
            proof.on_device.reset()
            proof.amend(**_graphs(self))
            Publisher(proof.on_device, proof.publish, PUBLISHED).start()
        return result

    return compile_or_warm_up_model


def _graphs(worker) -> dict:
    """The mode that vLLM settled on, which may be less than was asked for, and how many graphs were captured."""
    from vllm.compilation.counter import compilation_counter

    mode = worker.vllm_config.compilation_config.cudagraph_mode
    name = mode.name if mode is not None else "NONE"
    return {"cudagraph_mode": name, "graphs_captured": compilation_counter.num_cudagraph_captured}


def _compute_slot_mappings(original):
    def compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out=None):
        slots = original(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out)
        if len(slots):
            count_tokens(current(), slots[0], query_start_loc, positions)
        return slots

    return compute_slot_mappings


def count_tokens(
    context: ContextParallel, slots: torch.Tensor, query_start_loc: torch.Tensor, positions: torch.Tensor
) -> None:
    """Count one step's tokens, and the requests whose shard is empty here, without waiting for the device.

    slots: [T or more], -1 for what another rank owns and for padding. query_start_loc: [R + 1 or more], the rest equal
    to the number of real tokens T. positions: [T or more], of each token in its own sequence.
    """
    if counters := context.proof.on_device:
        counters.flush()  # for graphs captured since
        if counters.follows:
            context.proof.step_is((query_start_loc[1:] - query_start_loc[:-1]).max() > 1)
    group = {"kvp": context.kvp, "kvp_rank": context.kvp_rank, "interleave": context.interleave}
    if slots.is_cuda:
        from helix_runtime.token_count import count

        count(counters.values, counters.names, slots, query_start_loc, positions, **group)
        return
    proof, rows = context.proof, len(slots)
    proof.count("local_tokens", (slots >= 0).sum())
    proof.count("global_tokens", query_start_loc[-1])
    real = torch.arange(rows, device=slots.device) < query_start_loc[-1]
    proof.count("misplaced_tokens", (misplaced(slots, positions[:rows], **group) & real).sum())
    ends = query_start_loc[1:]
    last = positions[(ends - 1).clamp(min=0)]
    # Rank k's shard of a sequence is empty if and only if its length is at most interleave * k.
    empty = (last < context.interleave * context.kvp_rank) & (ends > query_start_loc[:-1])
    proof.count("empty_shard", empty.sum())

"""Slot mapping on CPU under context parallelism.

Why: the CPU stand-in for the Triton kernel refuses more than one context-parallel rank.
Hook: `BlockTable.compute_slot_mapping`.
Upstream: vllm `utils/cpu_triton_utils.py`.
Remove when: that function handles `TOTAL_CP_WORLD_SIZE > 1`.
"""

import torch

from helix_runtime.sharding import misplaced, slot_mapping
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.faults import NOTHING_ARMED, Writing


def install() -> None:
    patch("vllm.v1.worker.block_table:BlockTable.compute_slot_mapping", _compute_slot_mapping)


def _compute_slot_mapping(original):
    def compute_slot_mapping(self, num_reqs, query_start_loc, positions):
        if self.dcp_world_size == 1 or self.slot_mapping_mode.name == "NONE":
            return original(self, num_reqs, query_start_loc, positions)
        starts = query_start_loc[: num_reqs + 1]

        def slot_of(positions: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            return slot_mapping(
                positions,
                self.block_table.gpu,
                starts,
                block_size=self.block_size,
                kvp=self.dcp_world_size,
                kvp_rank=self.dcp_rank,
                interleave=self.cp_kv_cache_interleave_size,
                out=out,
            )

        slot_of(positions, self.slot_mapping.gpu)
        context, tokens = current(), int(starts[-1])
        if context.armed is not NOTHING_ARMED:
            _strike(context, positions[:tokens], starts, slot_of, self.slot_mapping.gpu, self.block_size)
        group = {"kvp": context.kvp, "kvp_rank": context.kvp_rank, "interleave": context.interleave}
        wrong = misplaced(self.slot_mapping.gpu[:tokens], positions[:tokens], **group)
        context.proof.count("misplaced_tokens", wrong.sum())

    return compute_slot_mapping


def _strike(context, positions, starts, slot_of, slots, block_size: int) -> None:
    """Let the armed fault change the slots of the batch, in place."""
    counts, tokens = starts.diff(), len(positions)
    last = positions[(starts[1:] - 1).clamp(min=0)]
    # Too late to be read: attention asks for a site of its own, layer by layer.
    site = context.enter("all layers", len(counts), bool((counts == 1).all()), False, last + 1, starts)
    writing = Writing(slots[:tokens].clone(), positions, block_size, context.interleave, context.kvp, slot_of)
    slots[:tokens] = context.fault.slots(writing, site)
    context.site = None

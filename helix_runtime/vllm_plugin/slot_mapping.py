"""Slot mapping on CPU under context parallelism.

Why: the CPU stand-in for the Triton kernel refuses more than one context-parallel rank.
Hook: `BlockTable.compute_slot_mapping`.
Upstream: vllm `utils/cpu_triton_utils.py`.
Remove when: that function handles `TOTAL_CP_WORLD_SIZE > 1`.
"""

from helix_runtime.sharding import slot_mapping
from helix_runtime.vllm_plugin.compat import patch


def install() -> None:
    patch("vllm.v1.worker.block_table:BlockTable.compute_slot_mapping", _compute_slot_mapping)


def _compute_slot_mapping(original):
    def compute_slot_mapping(self, num_reqs, query_start_loc, positions):
        if self.dcp_world_size == 1 or self.slot_mapping_mode.name == "NONE":
            return original(self, num_reqs, query_start_loc, positions)
        slot_mapping(
            positions,
            self.block_table.gpu,
            query_start_loc[: num_reqs + 1],
            block_size=self.block_size,
            kvp=self.dcp_world_size,
            kvp_rank=self.dcp_rank,
            interleave=self.cp_kv_cache_interleave_size,
            out=self.slot_mapping.gpu,
        )

    return compute_slot_mapping

"""Tensor parallel groups on CPU of a size that vLLM's shared-memory collectives do not take, such as six ranks.

Why: those collectives are compiled for 2, 3, 4 and 8 ranks, and end with `Invalid world size` on others.
Hook: `CpuCommunicator._all_group_ranks_share_shm_group_name`, vLLM's own question whether a group may use them. Where
the answer is no, vLLM falls back to torch.distributed (gloo).
Upstream: vllm `distributed/device_communicators/cpu_communicator.py`.
Remove when: vLLM falls back by itself.
"""

from helix_runtime.vllm_plugin.compat import patch

SHARED_MEMORY_SIZES = (2, 3, 4, 8)


def install() -> None:
    patch(
        "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator._all_group_ranks_share_shm_group_name",
        _may_use_shared_memory,
    )


def _may_use_shared_memory(original):
    def may_use_shared_memory(self):
        # One rank never communicates; vLLM's own answer does for it.
        return (self.world_size == 1 or self.world_size in SHARED_MEMORY_SIZES) and original(self)

    return may_use_shared_memory

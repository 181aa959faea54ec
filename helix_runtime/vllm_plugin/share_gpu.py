"""Ranks that share one GPU: `additional_config={"helix": {"share_gpu": true}}`. For validation, never for speed.

Why: a layout of TP ranks can be proved on a machine with one GPU. NCCL refuses two ranks on a device.
Hook: `ParallelConfig.assigned_physical_gpu_ids` (a stock field) puts every rank on the one visible GPU; each takes its
share of `--gpu-memory-utilization`; the process groups use gloo; collectives on CUDA tensors are staged through host
memory, and cannot be captured into CUDA graphs.
Upstream: none; no engine offers it.
Remove when: a device-side exchange between processes on one GPU replaces the staging.
"""

import os

import torch
import torch.distributed as dist

from helix_runtime.vllm_plugin.refusal import HelixRefusal

_COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def admit(config) -> None:
    """Put all ranks of a VllmConfig on the one visible GPU. Raises HelixRefusal where that cannot be meant."""
    from vllm.platforms import current_platform

    parallel = config.parallel_config
    if not current_platform.is_cuda():
        raise HelixRefusal("share_gpu needs a CUDA device; on CPU ranks share the machine anyway")
    shared = [current_platform.device_id_to_physical_device_id(0)] * parallel.world_size
    if parallel.assigned_physical_gpu_ids == shared:  # a configuration that was admitted before, built anew
        return
    if current_platform.device_count() > 1 or parallel.assigned_physical_gpu_ids is not None:
        raise HelixRefusal(
            f"share_gpu puts all ranks on one GPU, but {current_platform.device_count()} are visible or --device-ids "
            f"names some; set CUDA_VISIBLE_DEVICES to one GPU, or drop share_gpu"
        )
    if not config.model_config.enforce_eager:
        raise HelixRefusal(
            "share_gpu stages collectives through host memory, which CUDA graphs cannot capture; add --enforce-eager"
        )
    parallel.assigned_physical_gpu_ids = shared
    parallel.disable_custom_all_reduce = True
    config.cache_config.gpu_memory_utilization /= parallel.world_size


def install() -> None:
    """Patch this worker process before its process groups exist."""
    from vllm.platforms import current_platform

    # Upstream's symmetric-memory collectives refuse ranks on one device.
    for name in ("A2A", "Q_GATHER", "KV_GATHER"):
        os.environ[f"VLLM_USE_DIRECT_DCP_{name}"] = "0"
    platform = type(current_platform)
    platform.dist_backend = "gloo"
    platform.get_device_communicator_cls = classmethod(lambda cls: _COMMUNICATOR)
    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, _staged_in_place(getattr(dist, name)))
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
        setattr(dist, name, _staged(getattr(dist, name)))


class _Done:
    """The handle of a collective that has finished before it returned."""

    def wait(self, timeout=None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _staged_in_place(collective):
    def call(tensor, *args, async_op=False, **kwargs):
        if not tensor.is_cuda:
            return collective(tensor, *args, async_op=async_op, **kwargs)
        host = tensor.cpu()
        collective(host, *args, **kwargs)
        tensor.copy_(host)
        return _Done() if async_op else None

    return call


def _staged(collective):
    def call(output, input, *args, async_op=False, **kwargs):
        if not output.is_cuda:
            return collective(output, input, *args, async_op=async_op, **kwargs)
        host = torch.empty(output.shape, dtype=output.dtype)
        collective(host, input.contiguous().cpu(), *args, **kwargs)
        output.copy_(host)
        return _Done() if async_op else None

    return call

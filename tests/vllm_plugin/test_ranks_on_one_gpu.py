"""Ranks on one GPU, as far as a host without one can show: what is refused, how memory is split, what is staged."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime.vllm_plugin import share_gpu
from helix_runtime.vllm_plugin.refusal import HelixRefusal


def config(ranks=4, eager=True, devices=None):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=ranks, assigned_physical_gpu_ids=devices, disable_custom_all_reduce=False
        ),
        model_config=SimpleNamespace(enforce_eager=eager),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.8),
    )


@pytest.fixture
def gpus(monkeypatch):
    """Call it with the number of GPUs that are visible; the first is the host's number 3."""

    def see(count, cuda=True):
        platform = SimpleNamespace(
            is_cuda=lambda: cuda, device_count=lambda: count, device_id_to_physical_device_id=lambda index: 3 + index
        )
        monkeypatch.setattr("vllm.platforms.current_platform", platform)

    return see


def test_all_ranks_go_to_the_one_visible_gpu_and_share_its_memory(gpus):
    gpus(1)
    shared = config()
    for _ in range(2):  # vLLM builds a configuration anew in each process
        share_gpu.admit(shared)
        assert shared.parallel_config.assigned_physical_gpu_ids == [3, 3, 3, 3]
        assert shared.cache_config.gpu_memory_utilization == pytest.approx(0.2)
        assert shared.parallel_config.disable_custom_all_reduce


@pytest.mark.parametrize(
    ("count", "cuda", "changes", "says"),
    [
        (4, True, {}, "but 4 are visible .*set CUDA_VISIBLE_DEVICES to one GPU"),
        (1, True, {"devices": [0, 1, 2, 3]}, "--device-ids names some"),
        (1, True, {"eager": False}, "CUDA graphs cannot capture; add --enforce-eager"),
        (0, False, {}, "needs a CUDA device"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_changed(gpus, count, cuda, changes, says):
    gpus(count, cuda)
    refused = config(**changes)
    with pytest.raises(HelixRefusal, match=says):
        share_gpu.admit(refused)
    assert refused.parallel_config.assigned_physical_gpu_ids == changes.get("devices")
    assert refused.cache_config.gpu_memory_utilization == 0.8


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU, and leaves it by a copy."""

    is_cuda = True

    def cpu(self):
        return self.as_subclass(torch.Tensor).clone()


def on_gpu(*values):
    return torch.tensor(values).as_subclass(OnGpu)


@pytest.mark.parametrize("async_op", [False, True])
def test_a_collective_sees_host_memory_and_its_result_comes_back(async_op):
    seen = []

    def doubled(tensor, *, group):
        seen.append((tensor.is_cuda, group))
        tensor.mul_(2)

    tensor = on_gpu(1.0, 2.0)
    done = share_gpu._staged_in_place(doubled)(tensor, group="tp", async_op=async_op)
    assert seen == [(False, "tp")] and tensor.tolist() == [2.0, 4.0]
    assert (done.wait() and done.is_completed()) if async_op else done is None

    def repeated(output, input, *, group):
        seen.append((output.is_cuda or input.is_cuda or not input.is_contiguous(), group))
        output.copy_(input.repeat(2))

    output, strided = on_gpu(0.0, 0.0, 0.0, 0.0), on_gpu(1.0, 9.0, 2.0, 9.0)[::2]
    done = share_gpu._staged(repeated)(output, strided, group="dcp", async_op=async_op)
    assert seen[1:] == [(False, "dcp")] and output.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert (done.wait() and done.is_completed()) if async_op else done is None


def test_what_lies_on_the_host_goes_through_untouched():
    kept = torch.ones(2)
    assert share_gpu._staged_in_place(lambda tensor, async_op: (tensor, async_op))(kept, async_op=True) == (kept, True)
    assert share_gpu._staged(lambda output, input, async_op: (output is kept, async_op))(kept, kept) == (True, False)

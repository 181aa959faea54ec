"""Our GPU exchanges between processes, and which one a group gets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helix_runtime.combine import select
from helix_runtime.combine.merge import merge_partials


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("world", [2, 4])
def test_processes_on_one_gpu_exchange_by_our_kernels(world, tmp_path):
    worker = Path(__file__).with_name("cuda_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(world), str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"direct ran among {world} ranks" in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_with_a_gpu_each_exchange_by_our_kernels(world, tmp_path):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    worker = Path(__file__).with_name("cuda_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(world), str(tmp_path), "own"], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"direct ran among {world} ranks on a GPU each" in done.stdout, done.stdout


@pytest.fixture
def alone(tmp_path):
    """A gloo group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("wanted", select.IMPLEMENTATIONS)
def test_what_runs_on_cpu_is_exact_and_named_with_the_reason(wanted, alone, caplog):
    chosen = select.choose(wanted, alone, "cpu")
    output, lse = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 4)
    found, found_lse = chosen.combine(output, lse, return_lse=True)
    expected, expected_lse = merge_partials(output[None], lse[None])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_lse, expected_lse)
    if wanted in ("torch", "ag_rs"):
        assert chosen.name == wanted and not caplog.records
    else:
        assert chosen.implementation == "torch"
        assert "triton: needs a CUDA device, not cpu" in chosen.name
        assert chosen.name in caplog.text  # loudly


def test_an_unknown_name_lists_the_known_ones(alone):
    with pytest.raises(ValueError, match="no combine is called 'nccl'; there are: torch, triton, direct, ag_rs"):
        select.choose("nccl", alone, "cpu")

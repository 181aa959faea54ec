"""Our GPU exchanges among `world` processes. `python cuda_worker.py WORLD FOLDER [own]`; exit 0 if all hold.

They share one GPU, with gloo through host memory in the place of NCCL, or have one each (`own`), with NCCL.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_worker import expected_merge, random_partials

from helix_runtime.combine import all_gather_reduce_scatter_combine
from helix_runtime.combine.collectives import DIST
from helix_runtime.combine.direct import DirectCombine, DirectUnavailable
from helix_runtime.combine.packed import PackedCombine
from helix_runtime.combine.workspace import Workspace

SHAPES = [(1, 2, 128), (64, 2, 128), (17, 1, 512), (300, 4, 64)]


def staged(output, input, *, group):
    """gloo through host memory: NCCL refuses two ranks on a device."""
    host = torch.empty(output.shape, dtype=output.dtype)
    DIST.all_to_all(host, input.cpu(), group=group)
    output.copy_(host)


def check(combine, members, me):
    for seed, (tokens, each, dim) in enumerate(SHAPES):
        outputs, lses = random_partials(seed, members, tokens, members * each, dim, torch.bfloat16, 0.3)
        mine = slice(me * each, (me + 1) * each)
        expected, expected_lse = expected_merge(outputs[:, :, mine], lses[:, :, mine], "e")
        for _ in range(3):  # buffers are used again
            output, lse = combine(outputs[me].cuda(), lses[me].cuda(), return_lse=True)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-5)


def check_captured(combine, members, me):
    """An odd number of exchanges in a graph, replayed with new inputs."""
    outputs, lses = random_partials(9, members, 8, members * 2, 128, torch.bfloat16, 0.0)
    output, lse = outputs[me].cuda(), lses[me].cuda()
    combine(output, lse)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [combine(output, lse + shift) for shift in range(3)]
    for seed in range(10, 14):
        outputs, lses = random_partials(seed, members, 8, members * 2, 128, torch.bfloat16, 0.0)
        output.copy_(outputs[me])
        lse.copy_(lses[me])
        graph.replay()
        torch.cuda.synchronize()
        expected, _ = expected_merge(outputs[:, :, 2 * me : 2 * me + 2], lses[:, :, 2 * me : 2 * me + 2], "e")
        for result in results:
            torch.testing.assert_close(result.double().cpu(), expected, rtol=2e-2, atol=2e-2)


def run(rank, world, folder, own):
    device = torch.device("cuda", rank if own else 0)
    torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if own else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    if own:
        packed = PackedCombine(group, Workspace(device))
        check(packed, world, rank)
        check_captured(packed, world, rank)
        check(partial(all_gather_reduce_scatter_combine, group=group), world, rank)
    else:
        check(PackedCombine(group, Workspace(device), staged), world, rank)
    try:
        direct = DirectCombine(group, device, nbytes=4096)
    except DirectUnavailable as unavailable:
        if rank == 0:
            print(f"direct not run: {unavailable}")
        return
    check(direct, world, rank)
    check_captured(direct, world, rank)
    dist.barrier()
    if rank == 0:
        print(f"direct ran among {world} ranks on {'a GPU each' if own else 'one GPU'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    own = sys.argv[3:] == ["own"]
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    os.environ |= {} if own else {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    mp.spawn(run, args=(int(sys.argv[1]), sys.argv[2], own), nprocs=int(sys.argv[1]))

"""N processes with a GPU each, NCCL between them (on CPU gloo, without graphs), whose candidates take turns.

A candidate is a list of calls on K different input sets, captured in one CUDA graph. Before each replay 256 MB are
read, so that nothing comes from the L2, and a small all-reduce lets all ranks start together. The time of a replay is
that of the slowest rank: an exchange is over when it is over everywhere. NVLink multicast is left off.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.timing import Call, Timing, spread_of

#: Multicast off in NCCL and in torch's symmetric memory.
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
#: Seconds after which a collective that not all ranks have come to ends its processes.
TIMEOUT = 60.0


@dataclass(frozen=True)
class Here:
    """This process among the others. `group` holds all of them."""

    rank: int
    ranks: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def agree(self, problem: str | None) -> str | None:
        """The first problem that any rank has, the same on all; None if none has. Collective, on the CPU."""
        found: list = [None] * self.ranks
        dist.all_gather_object(found, problem, group=self.group)
        return next((f"rank {rank}: {each}" for rank, each in enumerate(found) if each is not None), None)


def run(ranks: int, work: Callable, *given) -> None:
    """`work(here, *given)` in `ranks` processes. Raises torch's ProcessException where one of them ends otherwise."""
    os.environ.update(QUIET)
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (ranks, folder, work, given), nprocs=ranks)


def _main(rank: int, ranks: int, folder: str, work: Callable, given: tuple) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT))
    work(Here(rank, ranks, device, dist.group.WORLD), *given)
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Chain:
    """K calls that are replayed at once; `kept` are their results, each in memory of its own.

    `made_of` are the calls: a graph does not hold the buffers that they hold, and a replay needs them.
    """

    replay: Callable[[], object]
    calls: int
    kept: list[object]
    made_of: Sequence[Call]


def chain(calls: Sequence[Call], device: torch.device) -> Chain:
    """Calls in one CUDA graph, the first of them run before; on CPU a loop."""
    calls[0]()
    if device.type != "cuda":
        return Chain(lambda: [call() for call in calls], len(calls), [], calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events meanwhile
        kept = [call() for call in calls]
    return Chain(graph.replay, len(calls), kept, calls)


def times(here: Here, chains: Mapping[str, Chain], rounds: int) -> dict[str, Timing]:
    """Microseconds a call of every chain, by the slowest rank of each round; two rounds warm up. Collective."""
    mine: dict[str, list[float]] = {name: [] for name in chains}
    names, clock = list(chains), _Clock(here)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clock.time(name, chains[name].replay)
        for name, seconds in clock.read():
            if turn >= 2:
                mine[name].append(seconds * 1e6 / chains[name].calls)
    every: list = [None] * here.ranks
    dist.all_gather_object(every, mine, group=here.group)
    slowest = {name: map(max, zip(*(one[name] for one in every), strict=True)) for name in names}
    return {name: spread_of(list(found)) for name, found in slowest.items()}


class _Clock:
    """Times replays: with events on a GPU, which nothing waits for until `read`, else by the host's clock."""

    def __init__(self, here: Here):
        self.here, self.pending = here, []
        self.start = torch.zeros(1, device=here.device)
        if here.cuda:
            self.flush = torch.zeros(64 << 20, dtype=torch.float32, device=here.device)
            self.sink = torch.zeros((), device=here.device)

    def time(self, name: str, replay: Callable[[], object]) -> None:
        if not self.here.cuda:
            dist.all_reduce(self.start, group=self.here.group)
            began = time.perf_counter()
            replay()
            self.pending.append((name, time.perf_counter() - began))
            return
        torch.sum(self.flush, 0, out=self.sink)
        dist.all_reduce(self.start, group=self.here.group)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        self.pending.append((name, (start, end)))

    def read(self) -> list[tuple[str, float]]:
        """(name, seconds) of every replay since the last call."""
        pending, self.pending = self.pending, []
        if not self.here.cuda:
            return pending
        torch.cuda.synchronize()
        return [(name, start.elapsed_time(end) / 1e3) for name, (start, end) in pending]

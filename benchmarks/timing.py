"""Interleaved GPU timing by graph replay, with every input read cold.

Each candidate is a list of calls, one for each of K input sets. All K calls are captured in one CUDA graph, so a replay
touches K different sets and no Python runs between kernels. Candidates take turns, round after round, in one process;
before each replay 256 MB are read, which leaves nothing of any set in the L2. A time is the median over rounds of
(replay time / K); a chain of K empty kernels measured the same way is the floor. `interleave_alone` replays graphs of
one call each instead.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

Call = Callable[[], object]


@triton.jit
def _empty_kernel(pointer):
    pass


@triton.jit
def _copy_kernel(target, source, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offset, tl.load(source + offset, mask=offset < count), mask=offset < count)


@triton.jit
def copy_some(target, source, count, BLOCK: tl.constexpr):
    """Copy with as many programs as are launched: what an exchange that holds few multiprocessors looks like."""
    for start in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        tl.store(target + offset, tl.load(source + offset, mask=offset < count), mask=offset < count)


@triton.jit
def copy_at_rate(target, source, count, each, ns_per_word, ahead_ns, PIECE: tl.constexpr):
    """Copy as an exchange over links does: every program reads and writes `each` words, a piece at a time, and all of
    these bytes pass a link of its own, of one word in `ns_per_word`. It reads at most `ahead_ns` of link time ahead of
    the link, and ends when the link has delivered its last word. A piece that memory brings late leaves the link idle,
    and that time is lost: the link is never faster than its rate. The clock may be coarse (some tick once in a
    microsecond): a delivery is counted from the one before it, not from when the clock was seen to show it."""
    first = tl.program_id(0) * each
    delivered = globaltimer()
    for start in tl.range(first, tl.minimum(first + each, count), PIECE):
        offset = start + tl.arange(0, PIECE)
        mine = (offset < first + each) & (offset < count)
        tl.store(target + offset, tl.load(source + offset, mask=mine), mask=mine)
        tl.debug_barrier()  # the piece is there
        words = tl.minimum(tl.minimum(first + each, count) - start, PIECE)
        delivered = tl.maximum(delivered, globaltimer()) + (words * ns_per_word).to(tl.int64)
        while globaltimer() < delivered - ahead_ns:
            pass
    while globaltimer() < delivered:
        pass


@triton.jit
def _read_kernel(sink, source, count, BLOCK: tl.constexpr):
    """Sum of a strided share of `source`, 16 bytes a thread and access; every element is read, once."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=4):
        offset = start + tl.arange(0, BLOCK)
        total ^= tl.load(source + offset, mask=offset < count, other=0)
    tl.store(sink + tl.program_id(0), tl.sum(total, 0))


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, and the 10th and 90th percentile over rounds."""

    median: float
    low: float
    high: float

    def less(self, us: float) -> "Timing":
        return Timing(*(round(value - us, 3) for value in (self.median, self.low, self.high)))


def empty_call() -> Call:
    pointer = torch.zeros(1, device="cuda")
    return lambda: _empty_kernel[(1,)](pointer, num_warps=1)


def copy_calls(nbytes: int, sets: int) -> dict[str, list[Call]]:
    """Copies that read nbytes / 2 and write nbytes / 2: the driver's, and a Triton kernel with 16-byte accesses."""
    words = -(-nbytes // 2 // 16) * 4
    pairs = [[torch.randint(0, 1 << 20, (words,), dtype=torch.int32, device="cuda") for _ in "st"] for _ in range(sets)]

    def kernel(target: torch.Tensor, source: torch.Tensor) -> Call:
        # 128 threads, four 16-byte accesses each
        return lambda: _copy_kernel[(triton.cdiv(words, 2048),)](target, source, words, BLOCK=2048, num_warps=4)

    return {
        "copy_driver": [lambda t=t, s=s: t.copy_(s) for t, s in pairs],
        "copy_kernel": [kernel(t, s) for t, s in pairs],
    }


def read_call(memory: torch.Tensor) -> Call:
    """A kernel that reads `memory` once and keeps a checksum: the most that reading can reach."""
    words = memory.view(torch.int32)
    sink = torch.empty(132 * 8, dtype=torch.int32, device="cuda")
    return lambda: _read_kernel[(len(sink),)](sink, words, words.numel(), BLOCK=4096, num_warps=8)


def interleave(candidates: Mapping[str, Sequence[Call]], rounds: int = 40) -> dict[str, Timing]:
    """Time the candidates against each other, K calls to a replay. Their calls must be safe to capture."""
    return _time({name: [_capture(calls)] for name, calls in candidates.items()}, rounds)


def interleave_alone(candidates: Mapping[str, Sequence[Call]], rounds: int = 120) -> dict[str, Timing]:
    """The same with one call to a replay: each time then includes what starting a graph costs on the device."""
    return _time({name: [_capture([call]) for call in calls[:16]] for name, calls in candidates.items()}, rounds)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    results: list[object]  # keep each call's output in memory of its own


def _time(graphs: Mapping[str, Sequence[_Graph]], rounds: int) -> dict[str, Timing]:
    flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
    sink = torch.zeros((), device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for turn in range(rounds + 2):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            replayed = graphs[name][turn % len(graphs[name])]
            torch.sum(flush, 0, out=sink)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replayed.graph.replay()
            end.record()
            events.append((name, start, end, len(replayed.results)))
        torch.cuda.synchronize()
        if turn >= 2:  # the first two warm up
            for name, start, end, calls in events:
                samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: spread_of(values) for name, values in samples.items()}


def _capture(calls: Sequence[Call]) -> _Graph:
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return _Graph(graph, results)


def spread_of(values: list[float]) -> Timing:
    """Median and deciles of at least two times in microseconds."""
    deciles = statistics.quantiles(values, n=10)
    return Timing(round(statistics.median(values), 3), round(deciles[0], 3), round(deciles[-1], 3))

"""HOP-B on one GPU: a real attention, and beside it an exchange that is a real copy kernel of stated size.

    python -m benchmarks.overlap [--json PATH] [--only TEXT]
    python -m benchmarks.overlap --table PATH

For each attention (ours, `TRITON`), a copy kernel of a stated number of programs, each on one multiprocessor, moves as
many bytes as take half (or a tenth) of the attention's time when it runs alone. Programs have 512 threads, as NCCL's
channels have, or 128, which find room beside attention's own. They are held to the rate of a link, as an exchange
between GPUs is; or to none, and then memory, which is one GPU's, is all that limits them. A step is captured in a CUDA
graph for every way to cut the batch, and all are replayed in turns. The exchange of a micro-batch joins its attention's
runs and copies its share of the bytes. Micro-batches are attentions of their own, or one attention of the whole batch
says which rows are done (`flags`). Hidden is the part of the exchange's time by which the step with micro-batches is
shorter than attention, at its fastest, and exchange one after the other. Needs a CUDA device; `--table` needs none.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attention_cases import Attention, inputs
from benchmarks.overlap_table import table
from benchmarks.records import Record, Results
from helix_runtime.attention.split_kv import COUNTED_LAUNCH, COUNTED_PROGRAMS, GQA_LAUNCH, Launch, counted_splits
from helix_runtime.overlap import Way

CASES = [
    Attention(64, 128 << 10, 8, 1),
    Attention(64, 256 << 10, 8, 1),
    Attention(64, 16 << 10, 8, 1),
    Attention(8, 128 << 10, 8, 1),
    Attention(8, 16 << 10, 8, 1),
]
#: GB/s of a link: a network adapter's 400 Gbit/s, and parts of NVLink's 450.
NETWORK, NVLINK = 50.0, (100.0, 200.0)
#: Bytes a thread that a copy reads at once, and ahead of its link.
PIECE, AHEAD = 128, 1024
#: Launches of the attention one after the other, which is the fastest of these and of its own choice.
SPLITS = (8, 16, 32, 64)
LAUNCHES = (GQA_LAUNCH, COUNTED_LAUNCH)
#: Programs of `GQA_LAUNCH` that a multiprocessor holds: 40 KB of shared memory each, of 227 (sm_90).
RESIDENT = 5


@dataclass(frozen=True)
class Copy:
    """The exchange: programs, their threads, and GB/s of the link that they share (copied: as many are read, and
    written)."""

    programs: int
    threads: int
    rate: float | None = None

    @property
    def link(self) -> float | None:
        """Of each program."""
        return self.rate and self.rate / self.programs

    def __call__(self, target, source) -> None:
        """target, source: int32, each of a multiple of 16 words."""
        from benchmarks.timing import copy_at_rate, copy_some

        words, warps = source.numel(), self.threads // 32
        if self.link is None:
            copy_some[(self.programs,)](target, source, words, BLOCK=16 * self.threads, num_warps=warps)
            return
        each = -(-words // (16 * self.programs)) * 16
        piece, ahead = PIECE * self.threads // 4, int(AHEAD * self.threads / self.link)
        copy_at_rate[(self.programs,)](target, source, words, each, 4 / self.link, ahead, PIECE=piece, num_warps=warps)


#: Exchanges, and the shares of the attention's time that they take.
EXCHANGES = (
    *((Copy(programs, 128, NETWORK), (0.5, 0.1)) for programs in (8, 16, 32)),
    *((Copy(16 if rate < 150 else 32, 128, rate), (0.5,)) for rate in NVLINK),
    (Copy(2, 512, NETWORK), (0.5, 0.1)),
    (Copy(8, 512, NVLINK[-1]), (0.5,)),
    (Copy(2, 512), (0.5, 0.1)),
    (Copy(8, 512), (0.5,)),
)


@dataclass(frozen=True)
class Cut:
    """How a batch is cut: into `count` micro-batches, the last ones halved `halvings` times.

    room: each attention in so few runs that multiprocessors stay free; else in as many as are fastest alone. programs:
    one attention with flags, in about so many programs (`counted_splits`); 0 for an attention for each micro-batch.
    """

    count: int
    halvings: int = 0
    room: bool = False
    programs: int = 0
    launch: Launch = GQA_LAUNCH

    def splits(self, case: Attention) -> int:
        return counted_splits(case.batch * case.kv_heads, case.tokens, self.programs)

    def name(self, case: Attention) -> str:
        name = f"{self.count}{f' halved {self.halvings}x' if self.halvings else ''}{' room' if self.room else ''}"
        if not self.programs:
            return name
        return f"flags {name}, {self.splits(case)} splits of {self.launch.warps} warps"

    @property
    def way(self) -> Way | None:
        """What the rule calls this; None for a launch that it does not take."""
        if self.room or (self.programs and (self.programs, self.launch) != (COUNTED_PROGRAMS, COUNTED_LAUNCH)):
            return None
        return Way(self.count, self.halvings, bool(self.programs))


CUTS = [
    *(Cut(count) for count in (1, 2, 5, 8)),
    Cut(5, 3),
    Cut(8, 0, True),
    *(
        Cut(count, halvings, False, COUNTED_PROGRAMS, COUNTED_LAUNCH)
        for count, halvings in ((5, 0), (8, 0), (8, 3), (16, 0), (16, 3), (24, 3), (32, 2))
    ),
    *(
        Cut(24, 3, False, programs, launch)
        for programs, launch in ((2048, COUNTED_LAUNCH), (8192, COUNTED_LAUNCH), (8192, GQA_LAUNCH))
    ),
]


def _size(launch: Launch) -> dict[str, int]:
    return {"warps": launch.warps, "stages": launch.stages}


def measure(case: Attention, results: Results) -> None:
    import torch

    from benchmarks.timing import interleave
    from helix_runtime.attention.completion import counters
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.attention.split_kv import multiprocessors
    from helix_runtime.overlap import StreamLanes, micro_batches, overlapped, overlapped_once

    given = inputs(case, page=128)
    lanes, arrivals = StreamLanes("cuda"), StreamLanes("cuda")
    outputs = torch.empty(1, case.batch, case.q_heads, case.head_dim, dtype=torch.bfloat16, device="cuda")
    lses = torch.empty(1, case.batch, case.q_heads, device="cuda")
    done = counters(case.batch, "cuda")

    def begin(part: slice, splits: int | None = None):
        kernel = decode_kernel("TRITON", case.scale, splits=splits)
        return kernel.begin(given.query[part], given.kv_cache, given.block_table[part], given.lengths[part])

    def finish(part: slice, parts):
        decode_kernel("TRITON", case.scale).finish(parts, outputs[:, part], lses[:, part])

    def attend(splits: int | None = None, launch: Launch | None = None):
        decode_kernel("TRITON", case.scale, splits=splits, launch=launch).send(*given.arguments, outputs, lses)

    # Cuts of few tokens may be the same: of these the first, which the rule knows.
    cuts = list({cut.name(case): cut for cut in reversed(CUTS) if cut.count <= case.batch}.values())[::-1]
    launches = {None: attend} | {
        (splits, launch): lambda splits=splits, launch=launch: attend(splits, launch)
        for launch in LAUNCHES
        for splits in sorted({counted_splits(case.batch, case.tokens, 64 * splits) for splits in SPLITS})
    }
    found = interleave({launch: [call] for launch, call in launches.items()}, rounds=results.rounds)
    fastest = min(launches, key=lambda launch: found[launch].median)
    attention_us, attend_fastest = found[fastest].median, launches[fastest]
    for key, took in found.items():
        splits, launch = key or (None, GQA_LAUNCH)
        params = {"batch": case.batch, "local_tokens": case.tokens, "splits": splits, **_size(launch)}
        extra = {"case": case.name, "fastest": key == fastest}
        print(f"{case.name} attention, {splits or 'own'} splits of {launch.warps} warps: {took.median:.1f}")
        results.add(
            Record("overlap/attention", params, case.bytes, case.flops, took.median, took.low, took.high, extra)
        )
    source = torch.zeros(128 << 20, dtype=torch.int32, device="cuda")  # 512 MB
    target = torch.empty_like(source)
    for copy, shares in EXCHANGES:
        if copy.rate:
            words_us = copy.rate * 1e3 / 4
        else:
            probe = source[: 8 << 20]  # 32 MB: its rate tells how many bytes take the wanted time
            took = interleave({"probe": [lambda c=copy, p=probe: c(target[: p.numel()], p)]}, rounds=5)["probe"].median
            words_us = probe.numel() / took
        for share in shares:
            each = int(share * attention_us * words_us / case.batch) // 16 * 16
            words = each * case.batch
            if not 0 < words <= source.numel():
                continue

            def exchange(part: slice, copy=copy, each=each):
                span = slice(part.start * each, part.stop * each)
                copy(target[span], source[span])

            def step(cut: Cut, exchange=exchange, copy=copy):
                if cut.count == 1:
                    attend_fastest()
                    return exchange(slice(0, case.batch))
                slices = micro_batches(case.batch, cut.count, cut.halvings)

                def begun(index, part):
                    rows = part.stop - part.start
                    resident = RESIDENT * (multiprocessors(given.query.device) - copy.programs)
                    return begin(part, max(1, resident // rows) if cut.room else None)

                def moved(index, part, parts):
                    finish(part, parts)
                    exchange(part)

                if not cut.programs:
                    return overlapped(slices, begun, moved, lanes)
                kernel = decode_kernel("TRITON", case.scale, splits=cut.splits(case), launch=cut.launch)

                def begun_once():
                    return kernel.begin(*given.arguments, done=done)

                def arrived(_, part, parts):
                    finish(part, kernel.arrived(parts, part, done, case.kv_heads))

                def copied(_, part, nothing):
                    exchange(part)

                return overlapped_once(slices, begun_once, arrived, copied, lanes, arrivals)

            calls = {cut.name(case): [lambda cut=cut, step=step: step(cut)] for cut in cuts}
            calls["exchange"] = [lambda copy=copy, words=words: copy(target[:words], source[:words])]
            calls["attention"] = [attend_fastest]
            times = interleave(calls, rounds=results.rounds)
            alone, whole = times["exchange"].median, times["1"].median
            for cut in cuts:
                took = times[cut.name(case)]
                params = {
                    "batch": case.batch,
                    "local_tokens": case.tokens,
                    "micro_batches": len(micro_batches(case.batch, cut.count, cut.halvings)),
                    "halvings": cut.halvings,
                    "room": cut.room,
                    "flags": bool(cut.programs),
                    "splits": cut.splits(case) if cut.programs else None,
                    **_size(cut.launch),
                    "way": cut.way and [cut.way.count, cut.way.halvings, cut.way.once],
                    "exchange_programs": copy.programs,
                    "exchange_threads": copy.programs * copy.threads,
                    "exchange_link_gbps": copy.link,
                    "exchange_rate_gbps": copy.rate,
                    "exchange_bytes": 8 * words,  # as many are read as are written
                    "exchange_share": share,
                }
                extra = {
                    "case": case.name,
                    "cut": cut.name(case),
                    "attention_us": times["attention"].median,
                    "exchange_us": alone,
                    "exchange_us_low": times["exchange"].low,
                    "exchange_us_high": times["exchange"].high,
                    "hidden": round((whole - took.median) / alone, 3),
                }
                nbytes = case.bytes + 8 * words
                results.add(Record("overlap/step", params, nbytes, case.flops, took.median, took.low, took.high, extra))
            best = sorted(cuts, key=lambda cut: times[cut.name(case)].median)[:6]
            print(
                f"{case.name} {copy.programs} x {copy.threads} threads{f' at {copy.rate:g} GB/s' if copy.rate else ''} "
                f"share {share}: attention {times['attention'].median:.1f}, "
                f"exchange {alone:.1f} {4 * words / alone / 1e3:.0f} GB/s | "
                + " | ".join(f"{cut.name(case)}: {(whole - times[cut.name(case)].median) / alone:.2f}" for cut in best),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="only attentions whose name contains this")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        print(table(Results.read(options.table)))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.overlap needs a CUDA device")
    results = Results.start("overlap", options.json, options.rounds)
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            measure(case, results)
        except Exception as failure:
            results.failed(case.name, failure)
        results.write()
        torch.cuda.empty_cache()
    print(table(results))


if __name__ == "__main__":
    main()

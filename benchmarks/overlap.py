"""HOP-B on one GPU: a real attention, and beside it an exchange that is a real copy kernel of stated size.

    python -m benchmarks.overlap [--json PATH] [--only TEXT]
    python -m benchmarks.overlap --table PATH

For each attention (ours, `TRITON`), a copy kernel of a stated number of programs, each of 512 threads and so on one
multiprocessor, as an NCCL channel is, moves as many bytes as take half (or a tenth) of the attention's time when it
runs alone. Then a step is captured in a CUDA graph for every way to cut the batch, and all are replayed in turns. The
exchange of a micro-batch joins its attention's runs and copies its share of the bytes. Micro-batches are attentions of
their own, or one attention of the whole batch says which rows are done (`flags`). Hidden is the part of the exchange's
time by which the step with micro-batches is shorter than attention, at its fastest, and exchange one after the other.
Needs a CUDA device; `--table` needs none.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attention_cases import Attention, inputs
from benchmarks.records import Record, Results
from helix_runtime.overlap import measured_count, micro_batch_count

CASES = [
    Attention(64, 128 << 10, 8, 1),
    Attention(64, 256 << 10, 8, 1),
    Attention(64, 16 << 10, 8, 1),
    Attention(8, 128 << 10, 8, 1),
    Attention(8, 16 << 10, 8, 1),
]
PROGRAMS = (1, 2, 4, 8)
SHARES = (0.5, 0.1)
THREADS = 512
#: Runs of a row's context: the attention one after the other takes whichever is fastest of these and its own choice.
SPLITS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Cut:
    """How a batch is cut: into `count` micro-batches, the last ones halved `halvings` times.

    room: each attention in so few runs that multiprocessors stay free; else in as many as are fastest alone. waves: one
    attention with flags, in so many short programs (`flag_splits`); 0 for an attention for each micro-batch.
    """

    count: int
    halvings: int = 0
    room: bool = False
    waves: int = 0

    def name(self, case: Attention) -> str:
        name = f"{self.count}{f' halved {self.halvings}x' if self.halvings else ''}{' room' if self.room else ''}"
        return f"flags {name}, {flag_splits(case, self.waves)} splits" if self.waves else name


CUTS = [
    Cut(1),
    *(Cut(count) for count in (2, 5, 8)),
    *(Cut(count, 3) for count in (5, 6, 8)),
    *(Cut(count, 3, True) for count in (5, 6, 8)),
    Cut(8, 0, True),
    Cut(6, 4, True),
    *(Cut(count, halvings, waves=waves) for waves in (2, 4, 8, 16) for count in (5, 8, 16) for halvings in (0, 3)),
    *(Cut(16, 4, waves=waves) for waves in (4, 8, 16)),
]


def flag_splits(case: Attention, waves: int) -> int:
    """Runs of each row that give about `waves` programs for each of the GPU's places (three on each of 132
    multiprocessors); a power of two, and no run below 256 keys."""
    runs = waves * 3 * 132 / (case.batch * case.kv_heads)
    return max(1, min(1 << round(math.log2(max(1, runs))), case.tokens // 256))


def copier(programs: int):
    """(target, source int32) -> copies with that many programs of THREADS threads, each on one multiprocessor."""
    from benchmarks.timing import copy_some

    def copy(target, source):
        copy_some[(programs,)](target, source, source.numel(), BLOCK=16 * THREADS, num_warps=THREADS // 32)

    return copy


def measure(case: Attention, results: Results) -> None:
    import torch

    from benchmarks.timing import interleave
    from helix_runtime.attention.completion import counters
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.attention.split_kv import multiprocessors
    from helix_runtime.overlap import StreamLanes, micro_batches, overlapped, overlapped_once

    given = inputs(case, page=128)
    lanes = StreamLanes("cuda")
    outputs = torch.empty(1, case.batch, case.q_heads, case.head_dim, dtype=torch.bfloat16, device="cuda")
    lses = torch.empty(1, case.batch, case.q_heads, device="cuda")
    done = counters(case.batch, "cuda")

    def begin(part: slice, splits: int | None = None):
        kernel = decode_kernel("TRITON", case.scale, splits=splits)
        return kernel.begin(given.query[part], given.kv_cache, given.block_table[part], given.lengths[part])

    def finish(part: slice, parts):
        decode_kernel("TRITON", case.scale).finish(parts, outputs[:, part], lses[:, part])

    def attend(splits: int | None = None):
        decode_kernel("TRITON", case.scale, splits=splits).send(*given.arguments, outputs, lses)

    cuts = list({cut.name(case): cut for cut in CUTS if cut.count <= case.batch}.values())  # waves may be too many
    tried = [None, *sorted({*SPLITS, *(flag_splits(case, cut.waves) for cut in cuts if cut.waves)})]
    found = interleave({splits: [lambda splits=splits: attend(splits)] for splits in tried}, rounds=results.rounds)
    fastest = min(tried, key=lambda splits: found[splits].median)
    attention_us = found[fastest].median
    print(f"{case.name} attention: " + ", ".join(f"{n or 'own'} splits {t.median:.1f}" for n, t in found.items()))
    for splits, took in found.items():
        params = {"batch": case.batch, "local_tokens": case.tokens, "splits": splits}
        extra = {"case": case.name, "fastest": splits == fastest}
        results.add(Record("overlap/attention", params, case.bytes, case.flops, took.median, took.low, took.high, extra))
    source = torch.zeros(128 << 20, dtype=torch.int32, device="cuda")  # 512 MB
    target = torch.empty_like(source)
    for programs in PROGRAMS:
        copy = copier(programs)
        probe = source[: 8 << 20]  # 32 MB: its rate tells how many bytes take the wanted time
        rate = interleave({"probe": [lambda c=copy, p=probe: c(target[: p.numel()], p)]}, rounds=5)["probe"].median
        for share in SHARES:
            words = int(probe.numel() * share * attention_us / rate) // (4 * case.batch) * 4 * case.batch
            if not 0 < words <= source.numel():
                continue
            each = words // case.batch

            def exchange(part: slice, copy=copy, each=each):
                span = slice(part.start * each, part.stop * each)
                copy(target[span], source[span])

            def step(cut: Cut, exchange=exchange, programs=programs):
                if cut.count == 1:
                    attend(fastest)
                    return exchange(slice(0, case.batch))
                slices = micro_batches(case.batch, cut.count, cut.halvings)

                def begun(index, part):
                    rows = part.stop - part.start
                    resident = 3 * (multiprocessors(given.query.device) - programs)
                    return begin(part, max(1, resident // rows) if cut.room else None)

                def moved(index, part, parts):
                    finish(part, parts)
                    exchange(part)

                if not cut.waves:
                    return overlapped(slices, begun, moved, lanes)
                kernel = decode_kernel("TRITON", case.scale, splits=flag_splits(case, cut.waves))

                def begun_once():
                    return kernel.begin(*given.arguments, done=done)

                def moved_once(index, part, parts):
                    moved(index, part, kernel.arrived(parts, part, done, case.kv_heads))

                return overlapped_once(slices, begun_once, moved_once, lanes)

            calls = {cut.name(case): [lambda cut=cut, step=step: step(cut)] for cut in cuts}
            calls["exchange"] = [lambda copy=copy, words=words: copy(target[:words], source[:words])]
            calls["attention"] = [lambda: attend(fastest)]
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
                    "flags": bool(cut.waves),
                    "splits": flag_splits(case, cut.waves) if cut.waves else None,
                    "exchange_programs": programs,
                    "exchange_threads": programs * THREADS,
                    "exchange_bytes": 8 * words,
                    "exchange_share": share,
                }
                extra = {
                    "case": case.name,
                    "cut": cut.name(case),
                    "attention_us": times["attention"].median,
                    "exchange_us": alone,
                    "hidden": round((whole - took.median) / alone, 3),
                }
                nbytes = case.bytes + 8 * words
                results.add(Record("overlap/step", params, nbytes, case.flops, took.median, took.low, took.high, extra))
            best = sorted(cuts, key=lambda cut: times[cut.name(case)].median)[:6]
            print(
                f"{case.name} programs {programs} share {share}: attention "
                f"{times['attention'].median:.1f} exchange {alone:.1f} ({8 * words / alone / 1e3:.0f} GB/s) | "
                + " | ".join(f"{cut.name(case)}: {(whole - times[cut.name(case)].median) / alone:.2f}" for cut in best),
                flush=True,
            )


def table(results: Results) -> str:
    """Markdown: one line for each attention, exchange and share."""
    lines = [
        "| attention | exchange | attention µs | exchange µs | one after the other µs | micro-batches | µs | hidden |"
        " measured rule: micro-batches, change | predicting rule |",
        "|" + " --- |" * 10,
    ]
    groups: dict[tuple, list[Record]] = {}
    order = {case.name: number for number, case in enumerate(CASES)}
    ordered = sorted(
        (record for record in results.records if record.name == "overlap/step"),
        key=lambda record: (
            -record.params["exchange_share"],
            order.get(record.extra["case"], 99),
            record.params["exchange_programs"],
        ),
    )
    for record in ordered:
        keys = ("exchange_programs", "exchange_share", "exchange_bytes")
        groups.setdefault((record.extra["case"], *(record.params[key] for key in keys)), []).append(record)
    for (case, programs, share, nbytes), records in groups.items():
        several = [record for record in records if record.params["micro_batches"] >= 5]
        if not several:
            continue
        whole = next(record for record in records if record.params["micro_batches"] == 1)
        best = min(several, key=lambda record: record.us)
        by_count: dict[int, Record] = {}
        for record in records:
            count = record.params["micro_batches"]
            by_count[count] = min(by_count.get(count, record), record, key=lambda record: record.us)
        chosen = by_count[measured_count({count: record.us for count, record in by_count.items()})]
        alone = (best.extra["attention_us"], best.extra["exchange_us"])
        predicted = by_count[micro_batch_count(best.params["batch"], *alone)]
        cells = [
            case,
            f"{programs} SMs, {nbytes / 1e6:.1f} MB, {share:g} of the attention",
            f"{best.extra['attention_us']:.1f}",
            f"{best.extra['exchange_us']:.1f}",
            f"{whole.us:.1f}",
            best.extra["cut"],
            f"{best.us:.1f}",
            f"{best.extra['hidden']:.2f}",
            f"{chosen.params['micro_batches']}, {chosen.us / whole.us - 1:+.1%}",
            f"{predicted.params['micro_batches']}, {predicted.us / whole.us - 1:+.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="only attentions whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
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

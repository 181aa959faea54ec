"""HOP-B on one GPU: a real attention, and beside it an exchange that is a real copy kernel of stated size.

    python -m benchmarks.overlap [--json PATH] [--only TEXT]
    python -m benchmarks.overlap --table PATH

For each attention, a copy kernel on a stated number of multiprocessors moves as many bytes as take half (or a tenth) of
the attention's time when it runs alone. Then a step is captured in a CUDA graph for every number of micro-batches, and
all are replayed in turns. The exchange of a micro-batch copies its share of the bytes. Hidden is the part of the
exchange's time by which the step with micro-batches is shorter than attention and exchange one after the other.
Needs a CUDA device; `--table` needs none.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.attention_cases import Attention, inputs
from benchmarks.records import Record, Results

CASES = [
    Attention(64, 128 << 10, 8, 1),
    Attention(16, 256 << 10, 8, 1),
    Attention(64, 16 << 10, 8, 1),
    Attention(8, 128 << 10, 8, 1),
    Attention(8, 16 << 10, 8, 1),
]
MULTIPROCESSORS = (2, 4, 8, 16)
COUNTS = (1, 2, 4, 5, 6, 8, 12, 16)
SHARES = (0.5, 0.1)


def copier(multiprocessors: int):
    """(target, source int32) -> copies with that many programs of 1024 threads, one to a multiprocessor."""
    from benchmarks.timing import copy_some

    def copy(target, source):
        copy_some[(multiprocessors,)](target, source, source.numel(), BLOCK=8192, num_warps=32)

    return copy


def measure(case: Attention, results: Results, kernel_name: str) -> None:
    import torch

    from benchmarks.timing import interleave
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.overlap import StreamLanes, measured_count, micro_batch_count, micro_batches, overlapped

    page = 128 if kernel_name == "FLASH_ATTN" else 64
    given = inputs(case, page)
    kernel = decode_kernel(kernel_name, case.scale)
    lanes = StreamLanes("cuda")

    def attend(index, part):
        return kernel.decode(given.query[part], given.kv_cache, given.block_table[part], given.lengths[part])

    attention = interleave({"attention": [lambda: attend(0, slice(0, case.batch))]}, rounds=results.rounds)
    attention_us = attention["attention"].median
    source = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")  # 256 MB
    target = torch.empty_like(source)
    for multiprocessors in MULTIPROCESSORS:
        copy = copier(multiprocessors)
        probe = source[: 8 << 20]  # 32 MB: its rate tells how many bytes take the wanted time
        rate = interleave({"probe": [lambda c=copy, p=probe: c(target[: p.numel()], p)]}, rounds=5)["probe"].median
        for share in SHARES:
            words = int(probe.numel() * share * attention_us / rate) // (4 * case.batch) * 4 * case.batch
            if not 0 < words <= source.numel():
                continue
            each = words // case.batch

            def exchange(index, part, partial, copy=copy, each=each):
                span = slice(part.start * each, part.stop * each)
                copy(target[span], source[span])

            def step(count, exchange=exchange):
                overlapped(micro_batches(case.batch, count), attend, exchange, lanes)

            counts = [count for count in COUNTS if count <= case.batch]
            calls = {str(count): [lambda count=count, step=step: step(count)] for count in counts}
            calls["exchange"] = [lambda copy=copy, words=words: copy(target[:words], source[:words])]
            calls["attention"] = [lambda: attend(0, slice(0, case.batch))]
            times = interleave(calls, rounds=results.rounds)
            alone, whole = times["exchange"].median, times["1"].median
            chosen = measured_count({count: times[str(count)].median for count in counts})
            predicted = micro_batch_count(case.batch, times["attention"].median, alone, counts=counts)
            for count in counts:
                took = times[str(count)]
                results.add(
                    Record(
                        "overlap/step",
                        {
                            "attention": kernel_name,
                            "batch": case.batch,
                            "local_tokens": case.tokens,
                            "micro_batches": count,
                            "exchange_multiprocessors": multiprocessors,
                            "exchange_bytes": 8 * words,
                            "exchange_share": share,
                        },
                        case.bytes + 8 * words,
                        case.flops,
                        took.median,
                        took.low,
                        took.high,
                        {
                            "case": case.name,
                            "attention_us": times["attention"].median,
                            "exchange_us": alone,
                            "hidden": round((whole - took.median) / alone, 3),
                            "chosen": count == chosen,
                            "predicted": count == predicted,
                        },
                    )
                )
            print(
                f"{case.name} {kernel_name} SMs {multiprocessors} share {share}: attention "
                f"{times['attention'].median:.1f} exchange {alone:.1f} ({8 * words / alone / 1e3:.0f} GB/s) | "
                + " ".join(
                    f"{c}:{times[str(c)].median:.1f}({(whole - times[str(c)].median) / alone:.2f})" for c in counts
                ),
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
    for record in results.records:
        keys = ("attention", "exchange_multiprocessors", "exchange_share", "exchange_bytes")
        groups.setdefault((record.extra["case"], *(record.params[key] for key in keys)), []).append(record)
    for (case, kernel, multiprocessors, share, nbytes), records in groups.items():
        several = [record for record in records if record.params["micro_batches"] >= 5]
        if not several:
            continue
        whole = next(record for record in records if record.params["micro_batches"] == 1)
        best = min(several, key=lambda record: record.us)
        chosen = next(record for record in records if record.extra["chosen"])
        predicted = next(record for record in records if record.extra["predicted"])
        cells = [
            f"{case}, {kernel}",
            f"{multiprocessors} SMs, {nbytes / 1e6:.1f} MB, {share:g} of the attention",
            f"{best.extra['attention_us']:.1f}",
            f"{best.extra['exchange_us']:.1f}",
            f"{whole.us:.1f}",
            str(best.params["micro_batches"]),
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
    parser.add_argument("--kernels", default="TRITON,FLASH_ATTN")
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
        for kernel in options.kernels.split(","):
            if options.only in case.name:
                try:
                    measure(case, results, kernel)
                except Exception as failure:
                    results.failed(f"{case.name} {kernel}", failure)
                results.write()
                torch.cuda.empty_cache()
    print(table(results))


if __name__ == "__main__":
    main()

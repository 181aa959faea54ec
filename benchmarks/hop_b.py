"""HOP-B between real GPUs: a layer's attention and its real exchange, one after the other and in micro-batches.

    python -m benchmarks.hop_b --ranks N --json PATH [--only TEXT]
    python -m benchmarks.hop_b --table PATH

N processes with a GPU each hold 1/N of the context of every request, attend with all query heads (our `TRITON`
kernel), and exchange their partials packed, through NCCL. With micro-batches the exchange of one runs on a second
stream beside the attention of the next; with `flags` one attention of the whole batch says which rows are done, and the
last micro-batches halve. All ways are captured in CUDA graphs, checked against the uncut one, and take turns; a time is
the slowest rank's. Without a GPU tiny sizes run in torch, gloo and threads: a test of this file, and no figure. The
plugin does not overlap on CUDA: vLLM's backends make their schedule for the whole batch.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException

from benchmarks.attention_cases import Attention, inputs
from benchmarks.ranks import Here, chain, run, times
from benchmarks.records import Record, Results
from helix_runtime.combine import all_to_all_combine, merge_partials
from helix_runtime.combine.workspace import PackedLayout
from helix_runtime.overlap import StreamLanes, ThreadLanes, micro_batches, overlapped, overlapped_once

#: (requests, tokens of the whole context, query heads, KV heads): Llama-3.1-8B with TPA 1.
SIZES = (
    (8, 32 << 10, 32, 8),
    (1, 128 << 10, 32, 8),
    (8, 128 << 10, 32, 8),
    (32, 32 << 10, 32, 8),
    (2, 512 << 10, 32, 8),
)
TINY = ((5, 64, 4, 2),)
CUTS = (1, 2, 5, 8)
#: Micro-batches of one attention, the last ones halved so often.
FLAGS, HALVINGS = (2, 5, 8), 3
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Layer:
    """One rank's attention and exchange over parts of a batch; `merged` [B, Q / N, D] is what comes out."""

    batch: int
    attend: object  # part -> what `exchange` sends
    exchange: object  # (part, that) -> None, fills merged[part]
    merged: torch.Tensor
    lanes: object
    arrivals: object
    begin: object  # () -> the whole batch's attention, under way
    arrive: object  # (index, part, that) -> what `move` sends, once it is there
    move: object  # (index, part, that) -> None, as `exchange`

    def step(self, count: int, flags: bool = False) -> None:
        if flags:
            parts = micro_batches(self.batch, count, HALVINGS)
            overlapped_once(parts, self.begin, self.arrive, self.move, self.lanes, self.arrivals)
            return
        parts = micro_batches(self.batch, count)
        overlapped(
            parts, lambda _, part: self.attend(part), lambda _, part, held: self.exchange(part, held), self.lanes
        )


def on_gpu(here: Here, case: Attention) -> Layer:
    """Our split-KV attention, which joins its runs in the send buffer, and the packed exchange."""
    from helix_runtime.attention.completion import counters
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.attention.split_kv import COUNTED_LAUNCH, counted_splits
    from helix_runtime.combine.packed import PackedCombine
    from helix_runtime.combine.workspace import Workspace

    given, kernel = inputs(case, page=128, seed=here.rank), decode_kernel("TRITON", case.scale)
    combine, owned = PackedCombine(here.group, Workspace(here.device)), case.q_heads // here.ranks
    merged = torch.empty(case.batch, owned, case.head_dim, dtype=torch.bfloat16, device=here.device)
    splits, done = counted_splits(case.batch * case.kv_heads, case.tokens), counters(case.batch, here.device)
    counted = decode_kernel("TRITON", case.scale, splits=splits, launch=COUNTED_LAUNCH)

    def attend(part: slice):
        return kernel.begin(given.query[part], given.kv_cache, given.block_table[part], given.lengths[part])

    def layout(part: slice) -> PackedLayout:
        return PackedLayout(here.ranks, part.stop - part.start, owned, case.head_dim, torch.bfloat16)

    def joined(part: slice, runs, lane: int = 0):
        return combine.sent(layout(part), lambda outputs, lses: kernel.finish(runs, outputs, lses), lane)

    def move(lane: int, part: slice, sent) -> None:
        merged[part] = combine.moved(layout(part), sent, lane=lane)[0]

    def exchange(part: slice, runs) -> None:
        move(0, part, joined(part, runs))

    def begin():
        return counted.begin(*given.arguments, done=done)

    def arrive(lane: int, part: slice, runs):
        return joined(part, counted.arrived(runs, part, done, case.kv_heads), lane)

    lanes, arrivals = StreamLanes(here.device), StreamLanes(here.device)
    return Layer(case.batch, attend, exchange, merged, lanes, arrivals, begin, arrive, move)


def on_cpu(here: Here, case: Attention) -> Layer:
    """The same in torch."""
    random = torch.Generator().manual_seed(here.rank)
    query = torch.randn(case.batch, case.q_heads, case.head_dim, generator=random)
    keys, values = torch.randn(2, case.batch, case.kv_heads, case.tokens, case.head_dim, generator=random)
    merged = torch.empty(case.batch, case.q_heads // here.ranks, case.head_dim)

    def attend(part: slice):
        grouped = query[part].unflatten(1, (case.kv_heads, -1))
        scores = torch.einsum("bkgd,bktd->bkgt", grouped, keys[part]) * case.scale
        output = torch.einsum("bkgt,bktd->bkgd", scores.softmax(-1), values[part])
        return output.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)

    def exchange(part: slice, partial) -> None:
        merged[part] = all_to_all_combine(*partial, here.group, merge=merge_partials)

    def arrive(_, part: slice, partial):
        return tuple(each[part] for each in partial)

    def move(_, part: slice, partial) -> None:
        exchange(part, partial)

    def begin():
        return attend(slice(0, case.batch))

    return Layer(case.batch, attend, exchange, merged, ThreadLanes(), ThreadLanes(), begin, arrive, move)


def _cuts() -> dict[str, tuple[int, bool]]:
    """Name -> micro-batches, and whether they are of one attention; "1" is uncut."""
    return {str(count): (count, False) for count in CUTS} | {f"flags {count}": (count, True) for count in FLAGS}


def measure(here: Here, case: Attention, results: Results) -> None:
    """Add a record for every cut that is right, and for attention alone; failures otherwise. Collective."""
    layer = (on_gpu if here.cuda else on_cpu)(here, case)
    layer.step(1)
    wanted = layer.merged.double().clone()
    chains = {"attention": chain([lambda: layer.attend(slice(0, case.batch))], here.device)}
    cuts = {name: cut for name, cut in _cuts().items() if cut[0] <= case.batch}
    for name, cut in cuts.items():
        problem = None
        try:
            layer.merged.fill_(float("nan"))
            layer.step(*cut)
            error = ((layer.merged.double() - wanted).norm() / wanted.norm()).item()
            if not error <= TOLERANCE:
                raise ArithmeticError(f"differs from the uncut exchange by {error:.2e}")
            made = chain([lambda cut=cut: layer.step(*cut)], here.device)
        except Exception as failed:
            problem = f"{type(failed).__name__}: {failed}"
        if said := here.agree(problem):
            results.failures.append({"what": f"N{here.ranks} {case.name} {name}", "error": said.splitlines()[0][:300]})
        else:
            chains[name] = made
    for name, took in times(here, chains, results.rounds).items():
        params = {"ranks": here.ranks, "batch": case.batch, "local_tokens": case.tokens}
        extra = {"case": f"N{here.ranks} {case.name}", "ranks": here.ranks, "graph": here.cuda}
        results.add(Record(f"hop_b/{name}", params, case.bytes, case.flops, took.median, took.low, took.high, extra))


def _work(here: Here, todo: list[Attention], results: Results) -> None:
    for case in todo:
        measure(here, case, results)
        if here.rank == 0:
            results.write()
            print(table(results).splitlines()[-1], flush=True)
        if here.cuda:
            torch.cuda.empty_cache()


def table(results: Results) -> str:
    """Markdown: microseconds of attention alone, of a layer uncut and cut, and what the best cut saves."""
    lines = [
        f"| size | attention | {' | '.join(f'{cut} micro-batches' for cut in _cuts())} | best cut |",
        "|" + " --- |" * (3 + len(_cuts())),
    ]
    for case, found in results.by_case("hop_b/").items():
        cuts = {name: us for name, us in found.items() if name != "attention"}
        best = min(cuts, key=cuts.get, default=None)
        saved = f"{best}, {cuts[best] / cuts['1'] - 1:+.1%}" if best and "1" in cuts else "–"
        cells = [f"{found[name]:.1f}" if name in found else "–" for name in ("attention", *_cuts())]
        lines.append(f"| {case} | {' | '.join(cells)} | {saved} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="processes, one GPU each")
    parser.add_argument("--json", type=Path, help="write the results here, and go on from what is there")
    parser.add_argument("--only", default="", help="only the sizes whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="one tiny size, for a test")
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        print(table(Results.read(options.table)))
        return
    if not options.ranks or options.ranks < 2 or not options.json:
        parser.error("--ranks N, two or more, and --json PATH")
    cuda, ranks = torch.cuda.is_available(), options.ranks
    if cuda and torch.cuda.device_count() < ranks:
        sys.exit(f"benchmarks.hop_b --ranks {ranks} needs as many GPUs; {torch.cuda.device_count()} are here")
    device = torch.cuda.get_device_name() if cuda else "cpu"
    command, versions = f"python -m benchmarks.hop_b --ranks {ranks}", {"torch": torch.__version__}
    results = Results("hop_b", command, device, versions, options.json, options.rounds)
    if options.json.exists() and (old := Results.read(options.json)).gpu == device and old.command == command:
        results.records, results.failures = old.records, old.failures
    done = {record.extra["case"] for record in results.records}
    wanted = [Attention(b, tokens // ranks, q, k, 16 if options.tiny else 128) for b, tokens, q, k in
              (TINY if options.tiny else SIZES)]  # fmt: skip
    todo = [case for case in wanted if options.only in case.name and f"N{ranks} {case.name}" not in done]
    while todo:
        try:
            run(ranks, _work, todo, results)
            break
        except ProcessException as ended:  # the size that ended them is left out, the others go on
            results = Results.read(options.json) if options.json.exists() else results
            todo = todo[sum(f"N{ranks} {case.name}" in {r.extra["case"] for r in results.records} for case in todo) :]
            results.failed(f"N{ranks} {todo[0].name}", ended)
            results.write()
            todo = todo[1:]
    print(table(Results.read(options.json)))


if __name__ == "__main__":
    main()

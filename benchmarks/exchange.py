"""The exchange of partials between real GPUs: ours, and vLLM's own, in microseconds a layer.

    python -m benchmarks.exchange --ranks N --json PATH [--vllm-ops PATH] [--only TEXT] [--retry]
    python -m benchmarks.exchange --table PATH

N processes with a GPU each, NCCL between them; every candidate is checked against fp64 first, then all take turns as
CUDA graphs of K calls (`benchmarks.ranks`). A time is the median over rounds of the slowest rank's. What does not run
is a row of `failures`. With an existing `--json` of the same machine it goes on where that one ended; `--retry` tries
its failures again. Without a GPU the same runs on gloo and without graphs: that is a test of this file, and no figure.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException

from benchmarks import vllm_ops
from benchmarks.cases import Case
from benchmarks.exchange_series import IN_PLACE, SERIES, collectives
from benchmarks.ranks import Chain, Here, chain, run, times
from benchmarks.records import Record, Results

BATCHES = (1, 8, 64, 256)
SIZES = ((16, 128), (2, 128), (16, 512), (2, 512))  # heads for each destination and head size: GQA, MLA
TINY = ((1, 2, 16), (3, 2, 16))
#: Relative error against fp64 below which bf16 partials are merged rightly.
TOLERANCE = 1e-2
BARE = ("all_to_all", "all_gather", "all_reduce")


@dataclass(frozen=True)
class Asked:
    """What the processes are told: where results go, whose kernels, how often, how many calls a chain (0: by size)."""

    json: Path
    vllm_ops: Path | None
    rounds: int
    calls: int


def cases(ranks: int, tiny: bool = False) -> list[Case]:
    if tiny:
        return [Case(ranks, *size) for size in TINY]
    return [Case(ranks, batch, heads, head_dim) for heads, head_dim in SIZES for batch in BATCHES]


def partial_of(case: Case, rank: int, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, N * H, D] and lse [B, N * H] of `rank` in input set `number`: the same wherever it is made."""
    random = torch.Generator(device).manual_seed(1000 * number + rank)
    heads = case.ranks * case.heads
    output = torch.randn(case.batch, heads, case.head_dim, generator=random, device=device).to(case.dtype)
    return output, 3 * torch.randn(case.batch, heads, generator=random, device=device)


def exact(case: Case, rank: int, device: torch.device) -> torch.Tensor:
    """What `rank` must get from input set 0: [B, H, D] in fp64."""
    mine = slice(rank * case.heads, (rank + 1) * case.heads)
    every = [partial_of(case, other, 0, device) for other in range(case.ranks)]
    weights = torch.stack([lse[:, mine] for _, lse in every]).double().softmax(0)[..., None]
    return sum(output[:, mine].double() * weight for (output, _), weight in zip(every, weights, strict=True))


def measure(here: Here, case: Case, names: list[str], vllm: vllm_ops.VllmOps | None, results: Results, calls: int):
    """Add a record for each of `names` that runs everywhere and is right, a failure for each other. Collective."""
    inputs = [partial_of(case, here.rank, number, here.device) for number in range(calls or case.sets)]
    wanted = exact(case, here.rank, here.device)
    bare = collectives(here, case)
    between = _between(here)
    chains: dict[str, Chain] = {}
    if bare.keys() & set(names):
        chains["between"] = chain([between] * len(inputs), here.device)
    errors: dict[str, float] = {}
    for name in names:
        problem = None
        try:
            if name in bare:
                zeros = [torch.zeros_like(output) for output, _ in inputs]
                made = chain([lambda o=o, c=bare[name][1]: (between(), c(o)) for o in zeros], here.device)
            else:
                combine = SERIES[name](here, case, vllm)
                merged = combine(inputs[0][0].clone(), inputs[0][1].clone()).double()
                errors[name] = ((merged - wanted).norm() / wanted.norm()).item()
                if not errors[name] <= TOLERANCE:
                    raise ArithmeticError(f"differs from fp64 by {errors[name]:.2e}")
                own = [(o.clone(), x.clone()) for o, x in inputs] if name in IN_PLACE else inputs
                made = chain([lambda o=o, x=x, c=combine: c(o, x) for o, x in own], here.device)
        except Exception as error:
            problem = error
        if said := here.agree(problem and f"{type(problem).__name__}: {problem}"):
            results.failures.append({"what": f"{case.name} {name}", "error": said.splitlines()[0][:300]})
        else:
            chains[name] = made
    found = times(here, chains, results.rounds) if chains else {}
    apart = found.pop("between", None)
    for name, took in found.items():
        took = took.less(apart.median) if name in bare else took
        params = {"ranks": case.ranks, "batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}
        extra = {"case": case.name, "ranks": case.ranks, "calls": len(inputs), "graph": here.cuda}
        nbytes = bare[name if name in bare else "all_to_all"][0]
        extra |= {"error": round(errors[name], 6)} if name in errors else {}
        full = f"{name}/nccl" if name in bare else f"exchange/{name}"
        results.add(Record(full, params, nbytes, 0, took.median, took.low, took.high, extra))


def _between(here: Here) -> Callable[[], object]:
    """A small kernel before each bare collective, whose time is taken off again: in a layer kernels lie between, and
    one NCCL kernel right after another takes longer than it does there (two H200s: 17.8 µs, where a whole exchange
    around the same All-to-All takes 9.7; `exchange-h200-n2.json` at commit bcd130b)."""
    one = torch.zeros(1, device=here.device)
    return lambda: one.add_(1)


def _work(here: Here, todo: list[tuple[Case, list[str]]], asked: Asked, results: Results) -> None:
    vllm = vllm_ops.load(asked.vllm_ops) if here.cuda else None
    for case, names in todo:
        measure(here, case, names, vllm, results, asked.calls)
        if here.rank == 0:
            results.write()
            print(case.name, *(f"{r.name}={r.us}" for r in results.records if r.extra["case"] == case.name), flush=True)
        if here.cuda:
            torch.cuda.empty_cache()


def left(results: Results, wanted: list[Case]) -> list[tuple[Case, list[str]]]:
    """Of each case the names that have neither a record nor a failure yet."""
    done = {f"{r.extra['case']} {r.name.removeprefix('exchange/').removesuffix('/nccl')}" for r in results.records}
    done |= {failure["what"] for failure in results.failures}
    todo = [(case, [name for name in (*SERIES, *BARE) if f"{case.name} {name}" not in done]) for case in wanted]
    return [(case, names) for case, names in todo if names]


def begun(asked: Asked, ranks: int, retry: bool) -> Results:
    """The results in the file, if they are of this machine and these versions; else none yet."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__}
    if device != "cpu":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["vllm"] = vllm_ops.source(asked.vllm_ops) or "not measured"
    command = f"python -m benchmarks.exchange --ranks {ranks}"
    new = Results("exchange", command, device, versions, asked.json, asked.rounds)
    if not asked.json.exists():
        return new
    old = Results.read(asked.json)
    if (old.command, old.gpu, old.versions) != (new.command, new.gpu, new.versions):
        sys.exit(f"{asked.json} holds another machine, other versions or other ranks; give another file")
    return Results(*(old.benchmark, old.command, old.gpu, old.versions, asked.json, asked.rounds, old.records),
                   [] if retry else old.failures)  # fmt: skip


def measured(ranks: int, wanted: list[Case], asked: Asked, retry: bool = False) -> Results:
    """Everything that is left of `wanted`, whatever ends the processes: what they were at then is a failure."""
    results = begun(asked, ranks, retry)
    while todo := left(results, wanted):
        results.write()
        problem = None
        try:
            run(ranks, _work, todo, asked, results)
        except ProcessException as ended:
            problem = str(ended).strip().splitlines()[-1]
        results = Results.read(asked.json)
        if problem and (still := left(results, wanted)):
            case, names = still[0]
            for name in names:
                results.failures.append(
                    {"what": f"{case.name} {name}", "error": f"the processes ended: {problem}"[:300]}
                )
            results.write()
    return results


def table(results: Results) -> str:
    """Markdown: one line a size, microseconds of every series, the fastest in bold, and the bare All-to-All."""
    lines = [f"| size | {' | '.join(SERIES)} | All-to-All alone |", "|" + " --- |" * (len(SERIES) + 2)]
    for case, found in results.by_case().items():
        best = min((us for name, us in found.items() if name.startswith("exchange/")), default=None)
        cells = []
        for name in (*(f"exchange/{series}" for series in SERIES), "all_to_all/nccl"):
            text = f"{found[name]:.1f}" if name in found else "–"
            cells.append(f"**{text}**" if found.get(name) == best and best is not None else text)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="processes, one GPU each")
    parser.add_argument("--json", type=Path, help="write the results here, and go on from what is there")
    parser.add_argument("--vllm-ops", type=Path, help="a copy of vllm/v1/attention/ops/dcp.py, where vLLM is absent")
    parser.add_argument("--only", default="", help="only the sizes whose name contains this, such as 'B64 H16'")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="two tiny sizes, for a test")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        print(table(Results.read(options.table)))
        return
    if not options.ranks or options.ranks < 2 or not options.json:
        parser.error("--ranks N, two or more, and --json PATH")
    if torch.cuda.is_available() and torch.cuda.device_count() < options.ranks:
        sys.exit(
            f"benchmarks.exchange --ranks {options.ranks} needs as many GPUs; {torch.cuda.device_count()} are here"
        )
    wanted = [case for case in cases(options.ranks, options.tiny) if options.only in case.name]
    asked = Asked(options.json, options.vllm_ops, options.rounds, 2 if options.tiny else 0)
    print(table(measured(options.ranks, wanted, asked, options.retry)))


if __name__ == "__main__":
    main()

"""Pack and combine against a copy of equal bytes, vLLM's kernels, and the merge in torch, eager and compiled.

    python -m benchmarks.combine [--vllm-ops PATH] [--json PATH] [--only TEXT] [--sweep]
    python -m benchmarks.combine --table PATH

Prints a table, and a verdict for each judged size; exits 0 whether or not a target is met. `--sweep` measures every
launch size instead, which is where the rules in `helix_runtime.combine` come from. Both need a CUDA device; `--table`
prints the table of earlier results, and needs none.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import triton

try:
    import flashinfer
except ImportError:
    flashinfer = None

from benchmarks import vllm_ops
from benchmarks.cases import JUDGED, OTHERS, SWEPT, Case, decode_mask, partials
from benchmarks.cases import SMALL as SMALL_CASES
from benchmarks.timing import Call, Timing, copy_calls, empty_call, interleave, interleave_alone
from helix_runtime.combine import kernels
from helix_runtime.combine.merge import merge_partials

PACK_LAUNCHES = [kernels.Launch(access, warps) for access, warps in itertools.product((16, 32, 64), (2, 4))]
COMBINE_LAUNCHES = [kernels.Launch(access, warps) for access, warps in itertools.product((4, 8, 16, 32), (2, 4))]
SMALL_PACKS = [
    kernels.Launch(access, warps, pdl) for access, warps, pdl in itertools.product((16, 32), (1, 4), (False, True))
]
SMALL_COMBINES = [
    kernels.Launch(access, warps, pdl) for access, warps, pdl in itertools.product((4, 8, 16), (1, 4), (False, True))
] + [kernels.Launch(8, 4, pdl, False) for pdl in (False, True)]
SMALL = 64  # tokens up to which latency, not bandwidth, is judged


def pack_candidates(case: Case, vllm: vllm_ops.VllmOps | None) -> dict[str, list[Call]]:
    """Ours and vLLM's, each with and without the mask for empty shards."""
    inputs, mask, layout = partials(case), decode_mask(case), case.layout
    sends = [torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda") for _ in inputs]
    views = [(layout.outputs(send), layout.lses(send)) for send in sends]
    jobs = list(zip(inputs, views, strict=True))
    candidates = {
        "ours": [lambda p=p, v=v: kernels.pack(*p, *v) for p, v in jobs],
        "ours_masked": [lambda p=p, v=v: kernels.pack(*p, *v, **mask) for p, v in jobs],
    }
    if vllm is not None and case.head_dim & (case.head_dim - 1) == 0:
        sends = [vllm.buffer(case.ranks, case.batch, case.heads, case.head_dim, case.dtype) for _ in inputs]
        jobs = list(zip(inputs, sends, strict=True))
        candidates["vllm"] = [lambda p=p, s=s: vllm.pack(*p, s) for p, s in jobs]
        candidates["vllm_masked"] = [lambda p=p, s=s: vllm.pack(*p, s, **mask) for p, s in jobs]
    return candidates


def combine_candidates(case: Case, vllm: vllm_ops.VllmOps | None, compiled: bool) -> dict[str, list[Call]]:
    """Ours with and without the LSE, vLLM's, and `merge_partials` in torch: each reads what was packed for it."""
    inputs, layout = partials(case), case.layout
    received = []
    for output, lse in inputs:
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda")
        kernels.pack(output, lse, layout.outputs(buffer), layout.lses(buffer))
        received.append((layout.outputs(buffer), layout.lses(buffer)))
    candidates = {
        "ours": [lambda r=r: kernels.combine(*r, return_lse=False) for r in received],
        "ours_lse": [lambda r=r: kernels.combine(*r) for r in received],
    }
    if vllm is not None and case.head_dim & (case.head_dim - 1) == 0:
        rows = [vllm.buffer(case.ranks, case.batch, case.heads, case.head_dim, case.dtype) for _ in inputs]
        for partial, row in zip(inputs, rows, strict=True):
            vllm.pack(*partial, row)
        candidates["vllm"] = [lambda r=r: vllm.combine(r) for r in rows]
    if flashinfer is not None and case.head_dim in (64, 128, 256, 512) and case.dtype != torch.float32:
        # Its layout is [B, N, H, D], its LSE of base 2.
        states = [(o.transpose(0, 1).contiguous(), (x / math.log(2)).transpose(0, 1).contiguous()) for o, x in received]
        candidates["flashinfer"] = [lambda s=s: flashinfer.merge_states(*s) for s in states]
    if compiled:
        torch.compiler.reset()
        merge = torch.compile(merge_partials, dynamic=False)
        candidates["torch"] = [lambda r=r: merge_partials(*r) for r in received]
        candidates["torch_compiled"] = [lambda r=r: merge(*r) for r in received]
    return candidates


def measure(case: Case, operation: str, vllm: vllm_ops.VllmOps | None) -> dict:
    """One row of the results: times in microseconds, the share of copy bandwidth, the gain over vLLM."""
    if operation == "pack":
        nbytes, candidates = case.pack_bytes, pack_candidates(case, vllm)
    else:
        compiled = case.judged and case.heads == 16 and case.head_dim == 128 and case.batch in (1024, 64)
        nbytes, candidates = case.combine_bytes, combine_candidates(case, vllm, compiled)
    candidates |= copy_calls(nbytes, case.sets) | {"empty": [empty_call()] * case.sets}
    times = interleave(candidates)
    alone = interleave_alone(candidates) if case.judged and case.batch <= SMALL else {}
    torch.cuda.empty_cache()
    copy = min(times["copy_driver"].median, times["copy_kernel"].median)
    row = {
        "case": case.name,
        "operation": operation,
        "bytes": nbytes,
        "sets": case.sets,
        "copy_gbps": round(nbytes / copy / 1e3, 1),
        "of_copy": {name: round(copy / t.median, 3) for name, t in times.items()},
        "us": {name: dataclasses.astuple(t) for name, t in times.items()},
    }
    if alone:
        row["us_alone"] = {name: dataclasses.astuple(t) for name, t in alone.items()}
    if "vllm" in times:
        row["speedup_over_vllm"] = round(times["vllm"].median / times["ours"].median, 2)
    if case.judged:
        row["targets"] = targets(case, times, alone, copy)
    return row


def targets(case: Case, times: dict[str, Timing], alone: dict[str, Timing], copy: float) -> dict[str, bool]:
    """Which of the judged criteria this size meets, by name; those that need vLLM only where it was measured."""
    ours, judged = times["ours"].median, {}
    if case.batch > SMALL:
        judged["0.80 of copy"] = copy / ours >= 0.80
        if case.head_dim == 128 and "vllm" in times:
            judged["2.0x vLLM"] = times["vllm"].median / ours >= 2.0
    elif "vllm" in times:
        for how, found in (("chained", times), ("alone", alone)):
            limit = max(found["vllm"].median / 2, 1.25 * found["empty"].median)
            judged[f"max(vLLM / 2, 1.25 empty), {how}"] = found["ours"].median <= limit
    return judged


def error(case: Case) -> dict:
    """Relative error of the combine against fp64, beside that of rounding the exact result to the case's dtype."""
    outputs = torch.randn(case.ranks, case.batch, case.heads, case.head_dim, dtype=case.dtype, device="cuda")
    lses = 3 * torch.randn(case.ranks, case.batch, case.heads, device="cuda")
    weights = torch.softmax(lses.double(), 0).unsqueeze(-1)
    exact = sum(outputs[n].double() * weights[n] for n in range(case.ranks))
    merged = {
        "ours": kernels.combine(outputs, lses)[0],
        "torch": merge_partials(outputs, lses)[0],
        "ideal": exact.to(case.dtype),
    }
    relative = {name: ((value.double() - exact).norm() / exact.norm()).item() for name, value in merged.items()}
    return {"case": case.name, "relative_error": relative, "ours_over_ideal": relative["ours"] / relative["ideal"]}


def sweep(case: Case, pack_launches: list, combine_launches: list, vllm: vllm_ops.VllmOps | None = None) -> dict:
    """Microseconds of every launch size, by operation, beside the copies, the empty kernel and vLLM's."""
    inputs, layout = partials(case), case.layout
    buffers = [torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda") for _ in inputs]
    views = [(layout.outputs(buffer), layout.lses(buffer)) for buffer in buffers]
    jobs = list(zip(inputs, views, strict=True))
    packs = {
        str(launch): [lambda p=p, v=v, x=launch: kernels.pack(*p, *v, launch=x) for p, v in jobs]
        for launch in pack_launches
    }
    combines = {
        str(launch): [lambda v=v, x=launch: kernels.combine(*v, return_lse=False, launch=x) for v in views]
        for launch in combine_launches
        if launch.access * case.ranks <= 512  # more would not fit the registers
    }
    if vllm is not None:
        rows = [vllm.buffer(case.ranks, case.batch, case.heads, case.head_dim, case.dtype) for _ in inputs]
        packs["vllm"] = [lambda p=p, r=r: vllm.pack(*p, r) for p, r in zip(inputs, rows, strict=True)]
        combines["vllm"] = [lambda r=r: vllm.combine(r) for r in rows]
    result = {"case": case.name}
    for operation, nbytes, candidates in (
        ("pack", case.pack_bytes, packs),
        ("combine", case.combine_bytes, combines),
    ):
        floors = copy_calls(nbytes, case.sets) | {"empty": [empty_call()] * case.sets}
        result[operation] = {name: t.median for name, t in interleave(floors | candidates, rounds=15).items()}
        if vllm is not None:
            alone = interleave_alone(floors | candidates, rounds=40)
            result[f"{operation}_alone"] = {name: t.median for name, t in alone.items()}
        torch.cuda.empty_cache()
    return result


def table(rows: list[dict]) -> str:
    """Markdown: medians in microseconds, the share of the faster copy's bandwidth, and the verdicts."""
    columns = ["size", "kernel", "ours", "vLLM", "copy", "empty", "of copy", "x vLLM", "with mask / LSE", "targets"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        us = {name: f"{values[0]:.2f}" for name, values in row["us"].items()}
        cells = [
            row["case"],
            row["operation"],
            us["ours"],
            us.get("vllm", "–"),
            min(us["copy_driver"], us["copy_kernel"], key=float),
            us["empty"],
            f"{row['of_copy']['ours']:.2f}",
            f"{row['speedup_over_vllm']:.2f}" if "speedup_over_vllm" in row else "–",
            us.get("ours_masked") or us["ours_lse"],
            "; ".join(f"{'met' if met else '**missed**'}: {what}" for what, met in row.get("targets", {}).items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_alone(rows: list[dict]) -> str:
    """Markdown: medians of graphs of one call each, in microseconds, and their limit."""
    lines = ["| size | kernel | ours | vLLM | copy | empty | limit |", "|" + " --- |" * 7]
    for row in rows:
        if "us_alone" not in row:
            continue
        us = {name: values[0] for name, values in row["us_alone"].items()}
        limit = max(us.get("vllm", 0.0) / 2, 1.25 * us["empty"])
        values = [
            us["ours"],
            us.get("vllm", float("nan")),
            min(us["copy_driver"], us["copy_kernel"]),
            us["empty"],
            limit,
        ]
        lines.append(f"| {row['case']} | {row['operation']} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-ops", type=Path, help="a copy of vllm/v1/attention/ops/dcp.py, where vLLM is absent")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--sweep", action="store_true", help="measure every launch size of our kernels instead")
    parser.add_argument("--small", action="store_true", help="measure launches of small batches, with and without PDL")
    parser.add_argument("--only", default="", help="only the sizes whose name contains this, such as 'B1024 H16'")
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        rows = json.loads(options.table.read_text())["rows"]
        print(table(rows), table_alone(rows), sep="\n\n")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.combine needs a CUDA device")

    def chosen(cases: list[Case]) -> list[Case]:
        return [case for case in cases if options.only in case.name]

    arguments = [argument.rsplit("/", 1)[-1] for argument in sys.argv[1:]]  # folders are the machine's own business
    results = {
        "command": " ".join(["python -m benchmarks.combine", *arguments]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    if options.sweep or options.small:
        results["sweep"] = []
        for case in chosen(SMALL_CASES if options.small else SWEPT):
            if options.small:
                found = sweep(case, SMALL_PACKS, SMALL_COMBINES, vllm_ops.load(options.vllm_ops))
            else:
                found = sweep(case, PACK_LAUNCHES, COMBINE_LAUNCHES)
            results["sweep"].append(found)
            print(json.dumps(results["sweep"][-1]), flush=True)
            keep()
        return
    vllm = vllm_ops.load(options.vllm_ops)
    results["vllm"] = vllm.source if vllm else "not installed: not measured"
    results["errors"] = [error(case) for case in (JUDGED[0], JUDGED[1], *OTHERS[-2:])]
    results["rows"] = []
    for case, operation in itertools.product(chosen(JUDGED + OTHERS), ("combine", "pack")):
        results["rows"].append(measure(case, operation, vllm))
        keep()
    print(table(results["rows"]), table_alone(results["rows"]), sep="\n\n")
    print(json.dumps(results["errors"], indent=1))


if __name__ == "__main__":
    main()

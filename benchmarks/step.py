"""One rank's decode step at real sizes: standard TP, standard DCP and Helix, for three models, at 128k and 1M tokens.

    python -m benchmarks.step [--json PATH] [--only TEXT]
    python -m benchmarks.step --table PATH

Measured on one GPU, for each layout, as one CUDA graph: all GEMMs of one rank's layer on its weight shards, attention
over its KV shard by the fastest backend here, pack and combine of the exchange. Modelled: what goes over links, by
`link_us`, all N GPUs in one NVLink domain and nothing overlapped. Left out, as in all layouts alike: norms, RoPE,
activations, router, embedding, head and sampling. A step is the number of layers times measured plus modelled. Needs a
CUDA device; `--table` needs none.
"""

import argparse
import math
import sys
from pathlib import Path

from benchmarks.attention_cases import inputs
from benchmarks.models import Gemm, Layout, Step, Transfer, step_of, token_bytes, weight_bytes
from benchmarks.records import Record, Results
from helix_runtime.shapes import load_shape

LINK_BYTES_PER_S = 450e9  # NVLink 4, one direction
# One-shot all-reduce of 512 bytes on 2, 4, 8 H100: 3.7, 4.8, 5.9 µs (github.com/sgl-project/sglang/pull/2904).
LATENCY_US, LATENCY_US_PER_DOUBLING = 2.6, 1.1
MEMORY_BYTES = 0.9 * 141e9
BATCH = 8
CONTEXTS = (128 << 10, 1 << 20)
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": (8, (), (2, 4, 8)),
    "meta-llama/Llama-3.1-405B-Instruct": (32, (4,), (4, 8, 16, 32)),
    "deepseek-ai/DeepSeek-R1": (32, (32,), (32,)),
}


def layouts(gpus: int, dcp: tuple[int, ...], helix: tuple[int, ...]) -> list[Layout]:
    return [
        Layout("standard-tp", gpus),
        *(Layout("standard-dcp", gpus, kvp) for kvp in dcp),
        *(Layout("helix", gpus, kvp) for kvp in helix),
    ]


def link_us(transfer: Transfer) -> float:
    """The link model: a latency that grows with log2 of the ranks, and bytes over one direction of NVLink.

    An all-reduce moves 2 (n - 1) / n of its bytes, an all-gather its own to n - 1 peers, an All-to-All what is given.
    """
    n = transfer.ranks
    moved = {
        "all-reduce": 2 * (n - 1) / n * transfer.bytes,
        "all-gather": (n - 1) * transfer.bytes,
        "all-to-all": transfer.bytes,
    }[transfer.kind]
    return LATENCY_US + LATENCY_US_PER_DOUBLING * math.log2(n) + moved / LINK_BYTES_PER_S * 1e6


def gemm_call(gemm: Gemm):
    """One product on weights of its own, as a call."""
    import torch

    shape = (gemm.batch,) if gemm.batch > 1 else ()
    given = torch.randn(*shape, gemm.tokens, gemm.k, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(*shape, gemm.n, gemm.k, dtype=torch.bfloat16, device="cuda") * gemm.k**-0.5
    if gemm.batch > 1:
        return lambda: torch.bmm(given, weight.transpose(1, 2))
    return lambda: torch.nn.functional.linear(given, weight)


def exchange_call(exchange: tuple[int, int, int, int]):
    """Pack and combine of one rank, as a call; what travels between them is modelled."""
    import torch

    from helix_runtime.combine import kernels
    from helix_runtime.combine.workspace import PackedLayout

    ranks, batch, each, size = exchange
    layout = PackedLayout(ranks, batch, each, size, torch.bfloat16)
    output = torch.randn(batch, ranks * each, size, dtype=torch.bfloat16, device="cuda")
    lse = torch.randn(batch, ranks * each, device="cuda")
    sent = torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda")
    received = torch.empty_like(sent)
    kernels.pack(output, lse, layout.outputs(received), layout.lses(received))

    def call():
        kernels.pack(output, lse, layout.outputs(sent), layout.lses(sent))
        return kernels.combine(layout.outputs(received), layout.lses(received), return_lse=False)

    return call


def attention_calls(step: Step, results: Results) -> dict:
    """The attention by every backend worth asking, as calls over one cache."""
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.attention.libraries import BackendAbsent

    case, calls, memory = step.attention, {}, None
    for name, page in (
        (("FLASHMLA", 64), ("FLASH_ATTN_MLA", 64), ("TRITON_MLA", 64))
        if case.latent
        else (("FLASH_ATTN", 128), ("TRITON", 128))
    ):
        try:
            kernel = decode_kernel(name, case.scale)
            given = inputs(case, page, memory)
            memory = given.kv_cache.flatten()
            kernel.decode(*given.arguments)
            calls[name] = [lambda kernel=kernel, given=given: kernel.decode(*given.arguments)]
        except (BackendAbsent, RuntimeError) as failure:
            results.failed(f"{case.name} {name}", failure)
    return calls


def measure_gemms(results: Results, gemms: list[Gemm]) -> None:
    """Records of single GEMMs, which the planner reads."""
    import torch

    from benchmarks.timing import interleave

    for gemm in gemms:
        sets = max(1, min(16, 600_000_000 // gemm.bytes))
        times = interleave({"gemm": [gemm_call(gemm) for _ in range(sets)]}, rounds=results.rounds)["gemm"]
        params = {"tokens": gemm.tokens, "k": gemm.k, "n": gemm.n, "batch": gemm.batch}
        case = f"{gemm.name} B{gemm.batch} {gemm.tokens} x {gemm.k} x {gemm.n}"
        results.add(
            Record("gemm/cublas", params, gemm.bytes, gemm.flops, times.median, times.low, times.high, {"case": case})
        )
        torch.cuda.empty_cache()


def measure(name: str, layout: Layout, context: int, results: Results) -> None:
    import torch

    from benchmarks.timing import interleave

    model = load_shape(name)
    step = step_of(model, layout, BATCH, context)
    attention = interleave(attention_calls(step, results), rounds=results.rounds)
    backend = min(attention, key=lambda key: attention[key].median)
    [attend] = {key: value for key, value in attention_calls(step, results).items() if key == backend}[backend]
    gemms = [gemm_call(gemm) for gemm in step.gemms]
    exchange = exchange_call(step.exchange) if step.exchange else None
    before = 1 if not model.use_mla else 3  # projections that come before attention

    def layer():
        for gemm in gemms[:before]:
            gemm()
        attend()
        if exchange:
            exchange()
        for gemm in gemms[before:]:
            gemm()

    parts = {"layer": [layer], "attention": [attend]}
    if exchange:
        parts["exchange"] = [exchange]
    times = interleave(parts, rounds=results.rounds)
    link = sum(link_us(transfer) for transfer in step.transfers)
    layer_us = times["layer"].median
    total = model.num_layers * (layer_us + link)
    free = MEMORY_BYTES - weight_bytes(model, layout)
    users = int(free // (token_bytes(model, layout) * context)) if free > 0 else 0
    case = f"{name.split('/')[1]} S{context >> 10}k {layout.name}"
    params = {
        "model": name,
        "mode": layout.mode,
        "gpus": layout.gpus,
        "kvp": layout.kvp,
        "context": context,
        "batch": BATCH,
    }
    nbytes = step.attention.bytes + sum(gemm.bytes for gemm in step.gemms)
    flops = step.attention.flops + sum(gemm.flops for gemm in step.gemms)
    layers = model.num_layers
    extra = {
        "case": case,
        "layers": layers,
        "layer_us": layer_us,
        "attention_us": times["attention"].median,
        "attention_backend": backend,
        "pack_and_combine_us": times["exchange"].median if exchange else 0.0,
        "link_us_modelled": round(link, 2),
        "weights_gb": round(weight_bytes(model, layout) / 1e9, 1),
        "kv_bytes_per_token": token_bytes(model, layout),
        "users_that_fit": users,
    }
    low, high = (layers * (edge + link) for edge in (times["layer"].low, times["layer"].high))
    results.add(Record("step/rank", params, layers * nbytes, layers * flops, total, low, high, extra))
    print(f"{case:60s} step {total / 1e3:8.2f} ms  layer {layer_us:8.1f} µs {extra}", flush=True)
    torch.cuda.empty_cache()


def table(results: Results) -> str:
    """Markdown: step times, their ratio to standard TP's, and users that fit."""
    lines = [
        "| model, context | layout | attention µs | measured layer µs | modelled links µs | step ms | vs standard TP |"
        " users that fit |",
        "|" + " --- |" * 8,
    ]
    steps = [record for record in results.records if record.name == "step/rank"]
    for record in steps:
        params, extra = record.params, record.extra
        base = next(
            other
            for other in steps
            if other.params["mode"] == "standard-tp"
            and (other.params["model"], other.params["context"]) == (params["model"], params["context"])
        )
        layout = Layout(params["mode"], params["gpus"], params["kvp"])
        cells = [
            f"{params['model'].split('/')[1]}, {params['context'] >> 10}k" if record is base else "",
            layout.name,
            f"{extra['attention_us']:.1f} ({extra['attention_backend']})",
            f"{extra['layer_us']:.1f}",
            f"{extra['link_us_modelled']:.1f}",
            f"{record.us / 1e3:.2f}",
            f"{base.us / record.us:.2f}",
            str(extra["users_that_fit"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        print(table(Results.read(options.table)))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.step needs a CUDA device")
    results = Results.start("step", options.json, options.rounds)
    for name, sizes in MODELS.items():
        if options.only not in name:
            continue
        for context in CONTEXTS:
            for layout in layouts(*sizes):
                try:
                    measure(name, layout, context, results)
                except Exception as failure:
                    results.failed(f"{name} {context} {layout.name}", failure)
                results.write()
                torch.cuda.empty_cache()
        gemms = {g for layout in layouts(*sizes) for g in step_of(load_shape(name), layout, BATCH, 1 << 20).gemms}
        try:
            measure_gemms(results, sorted(gemms, key=lambda gemm: (gemm.name, gemm.bytes)))
        except Exception as failure:
            results.failed(f"{name} GEMMs", failure)
        results.write()
    print(table(results))


if __name__ == "__main__":
    main()

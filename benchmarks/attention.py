"""Partial attention over a long context by every backend that is here, against the GPU's read bandwidth.

    python -m benchmarks.attention [--json PATH] [--only TEXT] [--backends A,B] [--tune]
    python -m benchmarks.attention --table PATH

Every backend, page size and split count of a size run in one process and take turns; times are medians of graph
replays. `--tune` measures the launch sizes of our Triton kernels instead. Each backend's error is that of one row
against fp64. Needs a CUDA device; `--table` needs none.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.attention_cases import JUDGED, OTHERS, SENT, Attention, exact_row, inputs
from benchmarks.records import Record, Results


@dataclass(frozen=True)
class Candidate:
    """One way to run an attention."""

    backend: str
    page: int
    options: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        extra = " ".join(f"{key}={_short(value)}" for key, value in self.options)
        return f"{self.backend} page={self.page} {extra}".strip()


def _short(value: object) -> str:
    return (
        value
        if isinstance(value, str)
        else "/".join(map(str, vars(value).values()))
        if _is_launch(value)
        else str(value)
    )


def _is_launch(value: object) -> bool:
    return type(value).__name__ == "Launch"


def candidates(case: Attention) -> list[Candidate]:
    """Backends x page sizes x split counts worth measuring for a size."""
    from helix_runtime.attention.split_kv import Launch

    if case.latent:
        return [
            Candidate("FLASHMLA", 64),
            Candidate("FLASH_ATTN_MLA", 64),
            Candidate("FLASH_ATTN_MLA", 16),
            Candidate("TRITON_MLA", 64),
            Candidate("TRITON_MLA", 16),
        ]
    rows = case.batch * case.kv_heads
    splits = sorted({max(1, -(-132 // rows)), max(1, -(-264 // rows)), max(1, -(-396 // rows))})
    fa = [Candidate("FLASH_ATTN", page) for page in (16, 64, 128, 256)]
    fa += [Candidate("FLASH_ATTN", page, (("splits", min(128, count)),)) for page in (16, 128) for count in splits]
    return [
        *dict.fromkeys(fa),
        *(Candidate("TRITON", page) for page in (16, 64, 128)),
        *(Candidate("TRITON", 64, (("launch", Launch(64, 4, stages)),)) for stages in (2, 4)),
        *(Candidate("FLASHINFER", page) for page in (16, 64)),
    ]


def tuned(case: Attention) -> list[Candidate]:
    """Launch sizes of our kernels."""
    from helix_runtime.attention.split_kv import Launch

    if case.latent:
        sizes = ((32, 4, 2), (32, 8, 2), (64, 8, 2), (64, 4, 2), (16, 4, 4), (128, 8, 1))
        return [Candidate("TRITON_MLA", 64, (("launch", Launch(*size)),)) for size in sizes]
    sizes = ((64, 4, 2), (64, 4, 3), (64, 2, 4), (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3))
    rows, found = case.batch * case.kv_heads, []
    for size, waves, page in itertools.product(sizes, (2, 3, 4, 6), (64, 128)):
        if size[0] <= page:
            options = (("splits", max(1, waves * 132 // rows)), ("launch", Launch(*size)))
            found.append(Candidate("TRITON", page, options))
    return found


def measure(case: Attention, chosen: list[Candidate], results: Results) -> None:
    """Measure one size and add its records."""

    from benchmarks.timing import interleave, read_call
    from helix_runtime.attention.device import decode_kernel, lse_base, settle
    from helix_runtime.attention.libraries import BackendAbsent

    memories = [inputs(case, 128, seed=seed).kv_cache.flatten() for seed in range(case.sets)]
    calls, errors, sets = {}, {}, {}
    for candidate in chosen:
        key = candidate.page
        if key not in sets:
            sets[key] = [inputs(case, candidate.page, memory, seed) for seed, memory in enumerate(memories)]
        try:
            runs = []
            for given in sets[key]:
                kernel = decode_kernel(candidate.backend, case.scale, **dict(candidate.options))
                base = lse_base(kernel, given.query, given.kv_cache)
                if kernel.needs_plan:
                    kernel.plan(*given.arguments)
                runs.append(lambda kernel=kernel, given=given: kernel.decode(*given.arguments))
            output, lse = settle(kernel, base, *runs[0](), sets[key][0].lengths)
            exact, exact_lse = exact_row(case, sets[key][0], 0)
            error = ((output[0].double() - exact).norm() / exact.norm()).item()
            worst = (lse[0].double() - exact_lse).abs().max().item()
            ideal = ((exact.to(output.dtype).double() - exact).norm() / exact.norm()).item()
            if not error < 2e-2 or not worst < 2e-2:
                raise ArithmeticError(f"relative error {error:.3g}, lse off by {worst:.3g}")
            errors[candidate.name] = (error, worst, ideal, base)
            calls[candidate.name] = runs
        except (BackendAbsent, RuntimeError, ArithmeticError, AssertionError, TypeError, ValueError) as failure:
            results.failed(f"{case.name} {candidate.name}", failure)
            if "illegal memory" in str(failure) or "misaligned" in str(failure):
                raise
    calls["read"] = [read_call(memory) for memory in memories]
    times = interleave(calls, rounds=results.rounds)
    read = times["read"].median
    for candidate in [*chosen, None]:
        name = "read" if candidate is None else candidate.name
        if name not in times:
            continue
        error = errors.get(name)
        params = {
            "batch": case.batch,
            "local_tokens": case.tokens,
            "q_heads": case.q_heads,
            "kv_heads": case.kv_heads,
            "head_dim": case.width,
            "latent": case.latent,
        }
        if candidate is not None:
            params |= {"page": candidate.page} | {key: _short(value) for key, value in candidate.options}
        extra = {"case": case.name, "of_read": round(read / times[name].median, 3)}
        if error:
            extra |= dict(zip(("relative_error", "lse_error", "bf16_rounding", "lse_base"), error, strict=True))
        results.add(
            Record(
                f"attention/{candidate.backend}" if candidate else "read/read",
                params,
                case.bytes,
                0 if candidate is None else case.flops,
                times[name].median,
                times[name].low,
                times[name].high,
                extra,
            )
        )
    print(f"{case.name}: read {read:.1f} µs, {case.bytes / read / 1e3:.0f} GB/s", flush=True)
    for name, timing in sorted(times.items(), key=lambda item: item[1].median):
        print(f"   {name:60s} {timing.median:10.1f} µs  {read / timing.median:.3f}  {errors.get(name, '')}", flush=True)


def measure_send(case: Attention, results: Results, ranks: int = 8) -> None:
    """Attention and pack against attention that writes into the send buffer of an exchange among `ranks`."""
    import torch

    from benchmarks.timing import interleave
    from helix_runtime.attention.device import decode_kernel
    from helix_runtime.combine import kernels
    from helix_runtime.combine.workspace import PackedLayout

    calls, memory = {}, None
    for name, page in (("FLASH_ATTN", 128), ("TRITON", 64)):
        kernel = decode_kernel(name, case.scale)
        given = inputs(case, page, memory)
        memory = given.kv_cache.flatten()
        layout = PackedLayout.of(given.query, ranks)
        sent = torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda")
        views = (layout.outputs(sent), layout.lses(sent))

        def decode_and_pack(kernel=kernel, given=given, views=views):
            kernels.pack(*kernel.decode(*given.arguments), *views, lengths=given.lengths)

        calls[f"{name} and pack"] = [decode_and_pack]
        calls[f"{name} sends"] = [lambda kernel=kernel, given=given, views=views: kernel.send(*given.arguments, *views)]
    for name, timing in interleave(calls, rounds=results.rounds * 2).items():
        params = {"batch": case.batch, "local_tokens": case.tokens, "q_heads": case.q_heads, "ranks": ranks}
        extra = {"case": f"{case.name} N{ranks}"}
        record = Record(f"send/{name}", params, case.bytes, case.flops, timing.median, timing.low, timing.high, extra)
        results.add(record)
        print(f"{extra['case']} {name}: {timing.median:.2f} µs", flush=True)


def table_send(results: Results) -> str:
    """Markdown: attention with a pack behind it, and attention that writes into the send buffer."""
    columns = ["FLASH_ATTN and pack", "FLASH_ATTN sends", "TRITON and pack", "TRITON sends"]
    lines = [f"| size, ranks | {' | '.join(columns)} |", "|" + " --- |" * 5]
    found = {record.extra["case"]: {} for record in results.records if record.name.startswith("send/")}
    for record in results.records:
        if record.name.startswith("send/"):
            found[record.extra["case"]][record.name.removeprefix("send/")] = f"{record.us:.1f}"
    lines += [
        f"| {case} | {' | '.join(times.get(column, '–') for column in columns)} |" for case, times in found.items()
    ]
    return "\n".join(lines)


def table(results: Results) -> str:
    """Markdown: for every size each backend's best, as a share of read bandwidth."""
    lines = [
        "| size | read µs | GB/s | backend | page, splits | µs | of read | TFLOP/s | error (bf16 rounding) |",
        "|" + " --- |" * 9,
    ]
    measured = [record for record in results.records if not record.name.startswith("send/")]
    for case in dict.fromkeys(record.extra["case"] for record in measured):
        rows = [record for record in results.records if record.extra["case"] == case]
        read = next(record for record in rows if record.name == "read/read")
        best: dict[str, Record] = {}
        for record in rows:
            if record is not read and record.us < best.get(record.name, replace(record, us=float("inf"))).us:
                best[record.name] = record
        for index, record in enumerate(sorted(best.values(), key=lambda record: record.us)):
            head = [case, f"{read.us:.1f}", f"{read.bytes / read.us / 1e3:.0f}"] if index == 0 else ["", "", ""]
            how = f"{record.params['page']}, {record.params.get('splits', 'own choice')}"
            error = f"{record.extra['relative_error']:.1e} ({record.extra['bf16_rounding']:.1e})"
            cells = [*head, record.name.removeprefix("attention/"), how, f"{record.us:.1f}"]
            cells += [f"{record.extra['of_read']:.2f}", f"{record.flops / record.us / 1e6:.0f}", error]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="only sizes whose name contains this")
    parser.add_argument("--backends", default="", help="only these, separated by commas")
    parser.add_argument("--tune", action="store_true", help="measure launch sizes of our kernels")
    parser.add_argument("--judged", action="store_true", help="only the judged sizes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--table", type=Path, help="print the table of these results")
    options = parser.parse_args()
    if options.table:
        results = Results.read(options.table)
        print(table(results), table_send(results), sep="\n\n")
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.attention needs a CUDA device")
    results = Results.start("attention", options.json, options.rounds)
    for case in JUDGED if options.judged or options.tune else JUDGED + OTHERS:
        if options.only not in case.name:
            continue
        chosen = tuned(case) if options.tune else candidates(case)
        if options.backends:
            chosen = [candidate for candidate in chosen if candidate.backend in options.backends.split(",")]
        try:
            measure(case, chosen, results)
        except Exception as failure:
            results.failed(case.name, failure)
        results.write()
        torch.cuda.empty_cache()
    if not options.tune:
        for case in SENT:
            if options.only in case.name:
                try:
                    measure_send(case, results)
                except Exception as failure:
                    results.failed(f"send {case.name}", failure)
                results.write()
    print(table(results), table_send(results), sep="\n\n")


if __name__ == "__main__":
    main()

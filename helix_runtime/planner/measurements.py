"""Measurements of kernels and collectives, read from any JSON below `benchmarks/` that has rows of the form

    {"device": "NVIDIA H200", "rows": [{"operation": "pack", "bytes": 38273024, "us": …}, …]}

`bytes`: read and written by one call; for a collective what one rank sends. Optional: `flops` and `dtype` (of the
operands, default bf16), `ranks` (default: the N of a `case` such as `N8 B64 H16`). `us`: microseconds, or [median, low,
high], or either of them by series (a backend, `vllm`, `ours`; `copy_…` and `empty` calibrate memory bandwidth and
launch). Rows of other forms are left out and told.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helix_runtime.planner.hardware import LL_BYTES, Gpu, named_gpu

#: `operation` starts with -> the term that it calibrates.
CLASSES = {
    "pack": "pack",
    "combine": "combine",
    "attention": "attention",
    "decode": "attention",
    "gemm": "weights",
    "linear": "weights",
    "matmul": "weights",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "all_gather": "all-gather",
    "read": "stream",
}
#: Made of several terms, so that they calibrate none; `benchmarks.links` compares whole exchanges.
_WHOLE = ("exchange", "hop_b")
#: Series that stand for the machine rather than for the operation.
_COPY, _EMPTY = "copy_", "empty"


@dataclass(frozen=True)
class Measurement:
    """One measured time. `roofline`: seconds that the data sheet would take; `kind`: a class, `stream` or `launch`;
    `large`: whether an All-to-All sends a peer more than `LL_BYTES`."""

    kind: str
    series: str
    case: str
    roofline: float
    seconds: float
    device: str
    source: str
    ranks: int = 1
    large: bool = False


@dataclass(frozen=True)
class Found:
    """`left_out`: rows that could not be used, as `file: reason`."""

    measurements: tuple[Measurement, ...]
    left_out: tuple[str, ...]


def read_measurements(folder: Path) -> Found:
    """Every usable row below `folder`; nothing where the folder is missing."""
    measurements: list[Measurement] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            left_out.append(f"{path.name}: no JSON ({error})")
            continue
        rows = document.get("rows") if isinstance(document, dict) else None
        gpu = named_gpu(str(document.get("device", ""))) if rows else None
        if not rows or gpu is None:
            left_out.append(f"{path.name}: " + ("unknown device" if rows else "no rows"))
            continue
        for number, row in enumerate(rows):
            try:
                measurements += _of_row(row, gpu, path.name)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                left_out.append(f"{path.name}: row {number}: {type(error).__name__}: {error}")
    return Found(tuple(measurements), tuple(left_out))


def _of_row(row: dict, gpu: Gpu, source: str) -> Iterator[Measurement]:
    operation = row["operation"]
    if operation in _WHOLE:
        return
    kind = next((kind for prefix, kind in CLASSES.items() if operation.startswith(prefix)), None)
    if kind is None:
        raise ValueError(f"operation {operation!r}; known: {', '.join(CLASSES)}")
    if kind == "attention" and "MLA" in str(row.get("case", "")):
        kind = "latent attention"
    nbytes, flops = float(row["bytes"]), float(row.get("flops", 0))
    named = re.search(r"\bN(\d+)\b", str(row.get("case", "")))
    ranks = int(row.get("ranks", named[1] if named else 1))
    memory = nbytes / (gpu.link if kind.startswith("all-") else gpu.bandwidth)
    roofline = max(memory, flops / gpu.arithmetic(row.get("dtype", "bf16")))
    case = f"{operation} {row.get('case', '')}".strip()
    large = kind == "all-to-all" and nbytes > LL_BYTES * (ranks - 1)
    times = row["us"] if isinstance(row["us"], dict) else {"": row["us"]}
    for series, value in times.items():
        seconds = float(value[0] if isinstance(value, list) else value) * 1e-6
        if not seconds > 0:
            raise ValueError(f"{series or 'us'} is {seconds * 1e6}")
        if series == _EMPTY:
            yield Measurement("launch", series, case, 0.0, seconds, gpu.key, source)
        elif series.startswith(_COPY):
            yield Measurement("stream", series, case, nbytes / gpu.bandwidth, seconds, gpu.key, source)
        else:
            yield Measurement(kind, series, case, roofline, seconds, gpu.key, source, ranks, large)

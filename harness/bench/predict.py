"""What the planner says of a benchmarked cell, to stand beside what was measured."""

import math

from harness.bench.result import Prediction
from harness.bench.spec import Load
from harness.cell import Cell
from harness.declared import shape_of
from helix_runtime.layout import LayoutError, resolve_layout
from helix_runtime.planner.calibration import ASSUMED_BAND, Calibration, calibrate
from helix_runtime.planner.cost import Workload, decode, eager
from helix_runtime.planner.grid import MERGES, Grid, entry
from helix_runtime.planner.hardware import named_gpu

_DTYPES = {"bfloat16": "bf16", "float16": "bf16", "auto": "bf16", "fp8": "fp8", "fp8_e4m3": "fp8", "nvfp4": "fp4"}


def predict(cell: Cell, load: Load, device: str, calibration: Calibration | None = None) -> Prediction:
    """Milliseconds between tokens of cell and baseline in the middle of the answer. `device`: the GPU's own name.

    Both are served with the same options, and so with or without CUDA graphs; the exchange is the cell's.
    """
    if cell.hardware == "cpu":
        return Prediction(why_not="no prediction on a CPU, whose ranks share cores")
    if dict(cell.helix).get("share_gpu") is True:
        return Prediction(why_not="no prediction for ranks that share a GPU")
    gpu = named_gpu(device)
    if gpu is None:
        return Prediction(why_not=f"no figures for {device or 'this GPU'} in hardware.json")
    options = dict(cell.serve)
    dtype, kv = str(options.get("dtype", "auto")), str(options.get("kv-cache-dtype", "auto"))
    if dtype not in _DTYPES or kv not in _DTYPES:
        return Prediction(why_not=f"no prediction for {dtype} with a {kv} KV cache")
    try:
        shape = shape_of(cell.model)
        layouts = [
            resolve_layout(tp, kvp, **shape.layout_arguments(), helix_mode=helix, allow_gqa_tpa1=True)
            for tp, kvp, helix in ((cell.tp, cell.kvp, cell.mode.helix), (cell.tp, 1, False))
        ]
    except (LookupError, LayoutError) as error:
        return Prediction(why_not=str(error))
    workload = Workload(shape, load.input + load.output // 2, _DTYPES[dtype], _DTYPES[kv])
    calibration = calibration or calibrate(gpu.key, cell.backend)
    replicate = options.get("dcp-q-replicate") is True
    merge = MERGES[cell.comm] if cell.comm else None
    grid = Grid.of(entry(layout, replicate and layout.kvp > 1, load.concurrency, merge) for layout in layouts)
    cost = decode(workload, gpu, calibration, grid)
    low, high = cost.band(calibration)
    hosted = eager(shape, calibration) if options.get("enforce-eager") is True else 0.0
    ours, theirs = (float(value + hosted) * 1e3 for value in cost.total)
    return Prediction(
        cell_ms=ours,
        cell_low_ms=float(low[0] + hosted * math.exp(-ASSUMED_BAND)) * 1e3,
        cell_high_ms=float(high[0] + hosted * math.exp(ASSUMED_BAND)) * 1e3,
        baseline_ms=theirs,
        ratio=ours / theirs,
    )

"""How long the planner takes to cost layouts, in CPU time, which other programs do not stretch.

python -m benchmarks.planner [--layouts 10000]
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from helix_runtime.layout import legal_layouts, resolve_layout
from helix_runtime.planner import calibrate, load_gpu
from helix_runtime.planner.cost import Workload, decode, prefill, stored_bytes
from helix_runtime.planner.grid import Grid, entry
from helix_runtime.planner.hardware import named_gpu
from helix_runtime.shapes import load_shape


def seconds(model: str, layouts: int) -> float:
    """Seconds of CPU, best of five: decode by term, prefill and weights of `layouts` rows, from the layouts on."""
    shape, gpu, calibration = load_shape(model), load_gpu("gb200"), calibrate("gb200")
    legal = legal_layouts(gpus=64, **shape.layout_arguments(), hardware=gpu.family, allow_gqa_tpa1=True)
    rows = [(layout, 1 + number // len(legal)) for number, layout in enumerate(legal * (layouts // len(legal) + 1))]
    workload, times = Workload(shape, 1_000_000, "fp4", "fp4"), []
    for _ in range(5):
        began = time.process_time()
        grid = Grid.of(entry(layout, batch=batch) for layout, batch in rows[:layouts])
        decode(workload, gpu, calibration, grid).band(calibration)
        prefill(workload, gpu, calibration, grid)
        stored_bytes(workload, grid)
        times.append(time.process_time() - began)
    return min(times)


@dataclass(frozen=True)
class Step:
    """One measured layer and its prediction, in microseconds; links are left out of both."""

    case: str
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def steps(file: Path) -> list[Step]:
    """Every step in `file` with the planner's prediction for one layer: no links, and no output embedding."""
    document = json.loads(file.read_text())
    gpu = named_gpu(document["device"])
    alone = replace(gpu, link=math.inf, network=math.inf, network_latency=0.0)
    alone = replace(alone, latency=0.0, latency_per_doubling=0.0, collectives={})
    found = []
    for row in document["rows"]:
        if row["operation"] != "step":
            continue
        asked = row["params"]
        shape = replace(load_shape(asked["model"]), vocab_size=0)
        helix = asked["mode"] == "helix"
        sizes = shape.layout_arguments()
        layout = resolve_layout(asked["gpus"], asked["kvp"], **sizes, helix_mode=helix, allow_gqa_tpa1=True)
        calibration = calibrate(gpu.key, row["attention_backend"])
        grid = Grid.of([entry(layout, q_replicate=helix, batch=asked["batch"])])
        cost = decode(Workload(shape, asked["context"]), alone, calibration, grid)
        low, high = cost.band(calibration)
        times = (float(value[0]) / shape.num_layers * 1e6 for value in (cost.total, low, high))
        found.append(Step(row["case"], row["layer_us"], *times))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=10_000)
    parser.add_argument("--steps", type=Path, metavar="FILE", help="compare with these measured steps instead")
    options = parser.parse_args()
    if options.steps:
        compared = steps(options.steps)
        print("| one layer of one rank, without links | measured µs | predicted µs | band | of measured |")
        print("| --- | --- | --- | --- | --- |")
        for one in compared:
            band = f"{one.low:.0f} to {one.high:.0f}" + ("" if one.inside else ", **outside**")
            share = one.predicted / one.measured
            print(f"| {one.case} | {one.measured:.0f} | {one.predicted:.0f} | {band} | {share:.2f} |")
        print(f"{sum(one.inside for one in compared)} of {len(compared)} inside their band")
        return
    count = options.layouts
    for model in ("meta-llama/Llama-3.1-405B-Instruct", "deepseek-ai/DeepSeek-R1"):
        print(f"{model}: {count:,} layouts costed in {seconds(model, count) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

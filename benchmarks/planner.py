"""How long the planner takes to cost layouts.

python -m benchmarks.planner [--layouts 10000]
"""

import argparse
import time

from helix_runtime.layout import legal_layouts
from helix_runtime.planner import calibrate, load_gpu
from helix_runtime.planner.cost import Workload, decode, prefill, stored_bytes
from helix_runtime.planner.grid import Grid, entry
from helix_runtime.shapes import load_shape


def seconds(model: str, layouts: int) -> float:
    """Best of five: decode by term, prefill and weights of `layouts` rows, from the layouts on."""
    shape, gpu, calibration = load_shape(model), load_gpu("gb200"), calibrate("gb200")
    legal = legal_layouts(gpus=64, **shape.layout_arguments(), hardware=gpu.family, allow_gqa_tpa1=True)
    rows = [(layout, 1 + number // len(legal)) for number, layout in enumerate(legal * (layouts // len(legal) + 1))]
    workload, times = Workload(shape, 1_000_000, "fp4", "fp4"), []
    for _ in range(5):
        began = time.perf_counter()
        grid = Grid.of(entry(layout, batch=batch) for layout, batch in rows[:layouts])
        decode(workload, gpu, calibration, grid).band(calibration)
        prefill(workload, gpu, calibration, grid)
        stored_bytes(workload, grid)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=10_000)
    count = parser.parse_args().layouts
    for model in ("meta-llama/Llama-3.1-405B-Instruct", "deepseek-ai/DeepSeek-R1"):
        print(f"{model}: {count:,} layouts costed in {seconds(model, count) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

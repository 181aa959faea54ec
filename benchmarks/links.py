"""The planner's link model fitted to measured exchanges, and how well it then tells them.

    python -m benchmarks.links [--json PATH] [FILE ...]        FILE: default benchmarks/results/exchange-*.json

The planner says that a collective among N ranks of one host takes `latency + per_doubling * log2(N) + bytes / rate`,
one latency for all of them. Both latencies and a rate for each collective are fitted to the bare collectives in the
files, by least squares of relative errors, none negative. The error is of sizes that the fit has not seen: each size is
left out in turn. Whole exchanges are then predicted as the planner does, with its own pack and combine, and compared.
With one number of ranks only, `per_doubling` is not in the data and stays the planner's. What comes out belongs into
`helix_runtime/planner/hardware.json`; efficiencies the planner reads from the files itself.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from helix_runtime.planner.calibration import calibrate
from helix_runtime.planner.hardware import Gpu, named_gpu

FOLDER = Path(__file__).resolve().parent / "results"
BARE = ("all_to_all", "all_gather", "all_reduce")


@dataclass(frozen=True)
class Point:
    """One measured time: `name` is a collective's, or the series of a whole exchange; `sent` bytes of one rank."""

    name: str
    case: str
    ranks: int
    sent: int
    us: float
    rows: int  # batch x heads of one destination
    head_dim: int


@dataclass(frozen=True)
class Links:
    """Microseconds, and bytes a second of each collective. `fixed`: whether `per_doubling` is the planner's own."""

    latency: float
    per_doubling: float
    rates: dict[str, float]
    fixed: bool

    def us(self, point: Point, collective: str | None = None) -> float:
        moved = point.sent / self.rates[collective or point.name] * 1e6
        return self.latency + self.per_doubling * math.log2(point.ranks) + moved


@dataclass(frozen=True)
class Told:
    """How well times are told: predicted over measured, its median and the 90th percentile of its distance from 1."""

    n: int
    median: float
    off: float


def read(files: Sequence[Path]) -> tuple[Gpu, list[Point]]:
    """Points of files that name the same GPU. ValueError for an unknown one, for two, or for none."""
    points, devices = [], set()
    for path in files:
        document = json.loads(path.read_text())
        devices.add(document["device"])
        for row in document["rows"]:
            (series, (us, *_)), *_ = row["us"].items()
            name = series if row["operation"] == "exchange" else row["operation"]
            sizes = row["params"]
            rows = sizes["batch"] * sizes["heads"]
            points.append(Point(name, row["case"], row["ranks"], row["bytes"], us, rows, sizes["head_dim"]))
    gpu = named_gpu(devices.pop()) if len(devices) == 1 else None
    if gpu is None:
        raise ValueError(f"the files must name one GPU of hardware.json, not {', '.join(sorted(devices)) or 'none'}")
    return gpu, points


def fit(points: Sequence[Point], per_doubling: float) -> Links:
    """The links of bare collectives. `per_doubling`: taken where only one number of ranks was measured."""
    names = [name for name in BARE if any(point.name == name for point in points)]
    fixed = len({point.ranks for point in points}) < 2
    us = np.array([point.us for point in points])
    steps = np.array([math.log2(point.ranks) for point in points])
    aims = us - per_doubling * steps if fixed else us
    columns = [np.ones(len(points)), np.zeros(len(points)) if fixed else steps]
    columns += [np.array([point.sent * 1e-6 if point.name == name else 0.0 for point in points]) for name in names]
    relative, wanted = np.array(columns).T / us[:, None], aims / us
    best, missed = np.zeros(len(columns)), math.inf
    rates = list(range(2, len(columns)))
    for free in (free for size in range(3) for free in combinations((0,) if fixed else (0, 1), size)):
        chosen = [*free, *rates]
        found, *_ = np.linalg.lstsq(relative[:, chosen], wanted, rcond=None)
        off = float(((relative[:, chosen] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and (found[len(free) :] > 0).all() and off < missed:
            best, missed = np.zeros(len(columns)), off
            best[chosen] = found
    if math.isinf(missed):
        raise ValueError("no latency and rates above 0 tell these times: they do not grow with the bytes")
    rate = {name: 1e12 / value for name, value in zip(names, best[2:], strict=True)}
    return Links(float(best[0]), per_doubling if fixed else float(best[1]), rate, fixed)


def unseen(points: Sequence[Point], per_doubling: float) -> dict[str, Told]:
    """How well each collective's times are told by fits to all other sizes."""
    ratios: dict[str, list[float]] = {}
    for case in dict.fromkeys(point.case for point in points):
        links = fit([point for point in points if point.case != case], per_doubling)
        for point in (point for point in points if point.case == case):
            ratios.setdefault(point.name, []).append(links.us(point) / point.us)
    return {name: told(found) for name, found in ratios.items()}


def exchanges(points: Sequence[Point], links: Links, gpu: Gpu) -> dict[str, Told]:
    """How well whole exchanges through one All-to-All are told: the links, and the planner's pack and combine."""
    kernels = calibrate(gpu.key)
    ratios: dict[str, list[float]] = {}
    for point in points:
        one = point.rows * (2 * point.head_dim + 4) / gpu.bandwidth
        seconds = kernels["pack"].predict(2 * point.ranks * one, point.ranks)
        seconds += kernels["combine"].predict((point.ranks + 1) * one, point.ranks)
        ratios.setdefault(point.name, []).append((links.us(point, "all_to_all") + seconds * 1e6) / point.us)
    return {name: told(found) for name, found in ratios.items()}


def told(ratios: Sequence[float]) -> Told:
    off = float(np.quantile([abs(ratio - 1) for ratio in ratios], 0.9, method="higher"))
    return Told(len(ratios), round(statistics.median(ratios), 3), round(off, 3))


def report(gpu: Gpu, points: Sequence[Point]) -> dict:
    """Everything that is printed."""
    bare = [point for point in points if point.name in BARE]
    whole = [point for point in points if point.name not in BARE and "ag_rs" not in point.name]
    doubling = gpu.latency_per_doubling * 1e6
    links = fit(bare, doubling)
    return {
        "gpu": gpu.key,
        "ranks": sorted({point.ranks for point in points}),
        "latency_us": round(links.latency, 2),
        "latency_us_per_doubling": round(links.per_doubling, 2),
        "per_doubling_is_the_planners": links.fixed,
        "planner_has": {"latency_us": gpu.latency * 1e6, "latency_us_per_doubling": doubling},
        "rate_gbps": {name: round(rate / 1e9, 1) for name, rate in links.rates.items()},
        "efficiency": {name: round(rate / gpu.link, 3) for name, rate in links.rates.items()},
        "unseen_sizes": {name: dataclasses.asdict(one) for name, one in unseen(bare, doubling).items()},
        "whole_exchanges": {name: dataclasses.asdict(one) for name, one in exchanges(whole, links, gpu).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results of benchmarks.exchange")
    parser.add_argument("--json", type=Path, help="write what is printed here")
    options = parser.parse_args()
    files = options.files or sorted(FOLDER.glob("exchange-*.json"))
    if not files:
        sys.exit("no benchmarks/results/exchange-*.json yet: python -m benchmarks.exchange --ranks N --json PATH")
    try:
        found = report(*read(files))
    except ValueError as error:
        sys.exit(str(error))
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

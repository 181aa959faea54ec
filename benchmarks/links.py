"""The planner's link model fitted to measured exchanges, and how well it then tells them.

    python -m benchmarks.links [--json PATH] [FILE ...]        FILE: default benchmarks/results/exchange-*.json

The planner says that a collective among N ranks of one host takes `latency + per_doubling * log2(N) + bytes / rate`,
and an All-to-All `large` more where a peer gets more than 16 KB, as NCCL then takes another protocol. All of it is
fitted, collective by collective, to the bare collectives in the files, by least squares of relative errors, none
negative. The error is of sizes that the fit has not seen: each is left out in turn, with those of as many ranks whose
bytes differ by less than a tenth. Whole exchanges are then predicted as the planner does, with its own pack and
combine, and compared. With one number of ranks only, `per_doubling` is not in the data and stays the planner's. What
comes out belongs into `helix_runtime/planner/hardware.json`; efficiencies the planner reads from the files itself.
All-reduces are fitted to be shown: a server of one host has vLLM's own instead of NCCL's.
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
from helix_runtime.planner.hardware import LL_BYTES, Gpu, named_gpu

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

    @property
    def large(self) -> bool:
        """Whether each peer gets more than NCCL sends by its protocol of short waits."""
        return self.sent > LL_BYTES * (self.ranks - 1)


@dataclass(frozen=True)
class Link:
    """One collective: microseconds, and bytes a second. `fixed`: whether `per_doubling` is the planner's own."""

    latency: float
    per_doubling: float
    large: float
    rate: float
    fixed: bool

    def us(self, point: Point) -> float:
        waits = self.latency + self.per_doubling * math.log2(point.ranks) + self.large * point.large
        return waits + point.sent / self.rate * 1e6


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


def fit(points: Sequence[Point], gpu: Gpu) -> Link:
    """The link of one bare collective. The planner's `per_doubling` is taken where one number of ranks was measured."""
    (name,) = {point.name for point in points}
    per_doubling = gpu.wait(kind_of(name)).per_doubling * 1e6
    fixed = len({point.ranks for point in points}) < 2
    us = np.array([point.us for point in points])
    steps = np.array([math.log2(point.ranks) for point in points])
    large = np.array([float(name == "all_to_all" and point.large) for point in points])
    columns = np.array([np.ones(len(points)), steps, large, [point.sent * 1e-6 for point in points]]).T / us[:, None]
    wanted = (us - per_doubling * steps if fixed else us) / us
    may = [0, *([] if fixed else [1]), *([2] if np.ptp(large) else [])]
    best, missed = np.zeros(4), math.inf
    for free in (free for size in range(len(may) + 1) for free in combinations(may, size)):
        chosen = [*free, 3]
        found, *_ = np.linalg.lstsq(columns[:, chosen], wanted, rcond=None)
        off = float(((columns[:, chosen] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and found[-1] > 0 and off < missed:
            best, missed = np.zeros(4), off
            best[chosen] = found
    if math.isinf(missed):
        raise ValueError(f"no latency and rate above 0 tell the times of {name}: they do not grow with the bytes")
    latency, grows, more, slope = (float(value) for value in best)
    return Link(latency, per_doubling if fixed else grows, more, 1e12 / slope, fixed)


def kind_of(name: str) -> str:
    """What the planner calls a collective."""
    return name.replace("_", "-")


def unseen(points: Sequence[Point], gpu: Gpu) -> Told:
    """How well one collective's times are told by fits to all other sizes."""
    ratios = []
    for one in points:
        others = [o for o in points if o.ranks != one.ranks or abs(math.log(o.sent / one.sent)) > math.log(1.1)]
        ratios.append(fit(others, gpu).us(one) / one.us)
    return told(ratios)


def exchanges(points: Sequence[Point], link: Link, gpu: Gpu) -> dict[str, Told]:
    """How well whole exchanges through one All-to-All are told: its link, and the planner's pack and combine."""
    kernels = calibrate(gpu.key)
    ratios: dict[str, list[float]] = {}
    for point in points:
        one = point.rows * (2 * point.head_dim + 4) / gpu.bandwidth
        seconds = kernels["pack"].predict(2 * point.ranks * one, point.ranks)
        seconds += kernels["combine"].predict((point.ranks + 1) * one, point.ranks)
        ratios.setdefault(point.name, []).append((link.us(point) + seconds * 1e6) / point.us)
    return {name: told(found) for name, found in ratios.items()}


def told(ratios: Sequence[float]) -> Told:
    off = float(np.quantile([abs(ratio - 1) for ratio in ratios], 0.9, method="higher"))
    return Told(len(ratios), round(statistics.median(ratios), 3), round(off, 3))


def report(gpu: Gpu, points: Sequence[Point]) -> dict:
    """Everything that is printed."""
    whole = [point for point in points if point.name not in BARE and "ag_rs" not in point.name]
    bare = {name: [point for point in points if point.name == name] for name in BARE}
    links = {name: fit(found, gpu) for name, found in bare.items() if found}
    return {
        "gpu": gpu.key,
        "ranks": sorted({point.ranks for point in points}),
        "collectives": {
            kind_of(name): {
                "latency_us": round(link.latency, 2),
                "latency_us_per_doubling": round(link.per_doubling, 2),
                "per_doubling_is_the_planners": link.fixed,
                "large_us": round(link.large, 2),
                "planner_has_us": {
                    field: round(value * 1e6, 2) for field, value in dataclasses.asdict(gpu.wait(kind_of(name))).items()
                },
                "rate_gbps": round(link.rate / 1e9, 1),
                "efficiency": round(link.rate / gpu.link, 3),
                "unseen_sizes": dataclasses.asdict(unseen(bare[name], gpu)),
            }
            for name, link in links.items()
        },
        "whole_exchanges": {
            name: dataclasses.asdict(one) for name, one in exchanges(whole, links["all_to_all"], gpu).items()
        },
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

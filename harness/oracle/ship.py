"""Measures the bands that the repository ships: `python -m harness.oracle.ship FOLDER …`, folders with transcripts.

One band for each dtype and kind of model, from every pair of standard TP with itself at another TP size.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from harness.oracle.band import SHIPPED, Band, kind_of, spread_of
from harness.oracle.calibrate import NullPair, calibrate
from harness.oracle.saved import Saved, find, pairs


def null_pairs(saved: Sequence[Saved]) -> list[tuple[Saved, NullPair]]:
    """Standard TP on several ranks against itself on one."""
    found = []
    for first, second in pairs(saved):
        if second.mode == "standard-tp" and second.tp == 1 and first.tp > 1:
            found.append((first, NullPair("tp size", first.transcript, second.transcript)))
    return found


def measured(saved: Sequence[Saved]) -> list[Band]:
    """One band a dtype and kind of model; its rows and curve, which belong to one workload, are left out."""
    pools: dict[tuple[str, str], list[NullPair]] = defaultdict(list)
    for first, pair in null_pairs(saved):
        pools[pair.baseline.dtype, kind_of(f"recipe:{first.model}")].append(pair)
    bands = []
    for (dtype, kind), some in sorted(pools.items()):
        spread = spread_of(dtype, "recipe:x-retrieve" if kind == "retrieve" else "recipe:x")
        band = calibrate(some, name=f"{dtype}, {kind} models, shipped", model=f"kind {kind}", spread=spread)
        bare = {"rows": (), "curve": ()}
        phases = {name: getattr(band, name).model_copy(update=bare) for name in ("prefill", "decode")}
        bands.append(band.model_copy(update={"workload_key": "", **phases}))
    return bands


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.oracle.ship", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args(argv)
    SHIPPED.mkdir(exist_ok=True)
    for band in measured(find(options.folders)):
        path = SHIPPED / f"{band.dtype}-{band.model.removeprefix('kind ')}.json"
        band.save(path)
        change = band.decode.change
        print(
            f"{path.name}: {len(band.sources)} pairs, {band.decode.n} decode steps, "
            f"99.9 % point of a step {change.point(1e-3):.2g} nat"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measures the bands that the repository ships: `python -m harness.oracle.ship FOLDER …`, folders with transcripts.

One band for each dtype and kind of model, from every pair of standard TP with itself at another TP size; and how much
the loudness of right servers varies as a whole, from standard TP alone.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from harness.oracle.band import SHIPPED, UNMEASURED, Band, Shapes, Source, Spread, kind_of
from harness.oracle.calibrate import MOSTLY, RESOLUTION, NullPair, calibrate
from harness.oracle.clean import Clean, clean_comparisons
from harness.oracle.compare import StepChange, compare
from harness.oracle.measure import LEAST_GROUP, log_ratio
from harness.oracle.saved import Saved, find, pairs
from harness.oracle.statistics import fit_shape

COMMAND = "python -m harness.oracle.ship"
LEAST_PAIRS = 4  # of servers, for a spread


def measured(saved: Sequence[Saved]) -> list[Band]:
    """One band a dtype and kind of model; its rows and curve, which belong to one workload, are left out."""
    pools: dict[tuple[str, str], list[NullPair]] = defaultdict(list)
    for first, second in pairs(saved):
        if first.standard and second.standard and first.tp > second.tp == 1:
            pools[_kind(first)].append(NullPair("tp size", first.transcript, second.transcript))
    clean: dict[tuple[str, str], list[Clean]] = defaultdict(list)
    for pair in clean_comparisons(saved):
        if pair.first.standard and pair.second.standard and reordered(pair.found.steps):
            clean[_kind(pair.first)].append(pair)
    spreads = {kind: spread for kind, some in clean.items() if (spread := spread_among(some)) is not None}
    bands = []
    for (dtype, kind), some in sorted(pools.items()):
        of_dtype = [spread for (other, _), spread in spreads.items() if other == dtype]
        widest = max(of_dtype, key=lambda spread: spread.cell, default=UNMEASURED)
        spread = spreads.get((dtype, kind), widest)
        name = f"shipped for {dtype}, {kind} models"
        band = calibrate(some, name=name, model=f"kind {kind}", spread=spread, shapes=shapes_among(some))
        bare = {"rows": (), "curve": ()}
        phases = {name: getattr(band, name).model_copy(update=bare) for name in ("prefill", "decode")}
        bands.append(band.model_copy(update={"workload_key": "", "sources": _merged(band.sources), **phases}))
    return bands


def shapes_among(some: Sequence[NullPair]) -> Shapes:
    """Shapes of the tails of decode over all pairs in which something was reordered."""
    changes, distances = [], []
    for _, baseline, candidate in some:
        steps = compare(baseline, candidate).steps
        if reordered(steps):
            decode = [step for step in steps if not step.prefill]
            changes.append([step.widest for step in decode])
            distances.append([step.distance for step in decode])
    return Shapes(change=fit_shape(changes).cautious, distance=fit_shape(distances).cautious)


def _merged(sources: Sequence[Source]) -> tuple[Source, ...]:
    """One source for all prompt sets of the same two cells."""
    found: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for source in sources:
        found[source.baseline, source.candidate].append(source)
    merged = []
    for some in found.values():
        steps = sum(source.steps for source in some)
        share = sum(source.identical * source.steps for source in some) / max(1, steps)
        prompts = sum(source.prompts for source in some)
        used = any(source.used for source in some)
        why = "" if used else some[0].why
        told = {"prompts": prompts, "steps": steps, "identical": share, "used": used, "why": why}
        merged.append(some[0].model_copy(update=told))
    return tuple(merged)


def reordered(steps: Sequence[StepChange]) -> bool:
    """Most decode steps changed: reductions were reordered."""
    decode = [step for step in steps if not step.prefill]
    return sum(step.widest <= RESOLUTION for step in decode) < MOSTLY * len(decode)


def spread_among(some: Sequence[Clean]) -> Spread | None:
    """How much loudness varies as a whole and by group, sampling error included; None from too few pairs of servers."""
    servers = {(pair.first.path.parent, pair.second.path.parent) for pair in some}
    if len(servers) < LEAST_PAIRS:
        return None
    cells, groups = [], []
    for pair in some:
        decode = [step for step in pair.found.steps if not step.prefill]
        whole = log_ratio(decode, pair.band.decode, pair.band.floor)[0]
        cells.append(whole)
        for steps in _groups(decode).values():
            if len(steps) >= LEAST_GROUP:
                groups.append(log_ratio(steps, pair.band.decode, pair.band.floor)[0] - whole)
    return Spread(cell=_rms(cells), group=_rms(groups), degrees=len(servers) - 1, source=COMMAND)


def _groups(steps: Iterable[StepChange]) -> dict[str, list[StepChange]]:
    found: dict[str, list[StepChange]] = defaultdict(list)
    for step in steps:
        for group in step.groups:
            found[group].append(step)
    return found


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


def _kind(saved: Saved) -> tuple[str, str]:
    return saved.transcript.dtype, kind_of(f"recipe:{saved.model}")


def ships(saved: Saved) -> bool:
    """Models with other weights (`-seedN`) are left out: how often the oracle alarms is measured with them."""
    return saved.complete and not saved.fault and "-seed" not in saved.model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", default="*", metavar="GLOB", help="bands whose name, as float16-made, matches")
    options = parser.parse_args(argv)
    SHIPPED.mkdir(exist_ok=True)
    for band in measured([item for item in find(options.folders) if ships(item)]):
        path = SHIPPED / f"{band.dtype}-{band.model.removeprefix('kind ')}.json"
        if not fnmatchcase(path.stem, options.only):
            continue
        band.save(path)
        change, spread = band.decode.change, band.spread
        point = change.bound(1e-3, 1000, spread.cell)
        print(
            f"{path.name}: {len(band.sources)} pairs, {band.decode.n} decode steps; 99.9 % point of a step "
            f"{change.point(1e-3):.2g} nat, of the largest of 1,000 {point:.2g} nat; shapes "
            f"{band.shapes.change:.2f} and {band.shapes.distance:.2f}; spread of loudness {spread.cell:.2f}, of groups "
            f"{spread.group:.2f}, degrees of freedom {spread.degrees}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

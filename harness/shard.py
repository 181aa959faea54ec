"""`--shard i/n`: the i-th of n parts of a plan, cut so that all parts take about as long.

Every cell has one part as its home. A baseline runs in each part that compares with it, since its transcript stays on
that host; `merge` puts the parts together again. The cut depends on the plan and on the times of committed evidence
only, so that hosts with the same checkout cut alike.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness.matrix import PlannedCell

#: Seconds of a cell that no run has timed, where no run has timed any.
DEFAULT_SECONDS = 60.0


class Shard(NamedTuple):
    """Part `part` (from 1) of `parts`."""

    part: int
    parts: int

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


def parse(text: str) -> Shard:
    """`2/3` -> Shard(2, 3). ValueError for anything else."""
    part, slash, parts = text.partition("/")
    if slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts):
        return Shard(int(part), int(parts))
    raise ValueError(f"'{text}'; allowed: I/N with I from 1 to N, as 1/3, 2/3 and 3/3")


def cut(plan: Sequence[PlannedCell], parts: int, seconds: Mapping[str, float]) -> list[list[PlannedCell]]:
    """The parts of `plan`, each in the plan's order. `seconds`: what cells took before, by id.

    The longest cell first, each to the part that is the shortest with it, the baselines that it brings along included.
    """
    usual = median(seconds.values()) if seconds else DEFAULT_SECONDS
    cost = {item.cell.key: 0.0 if item.skip else seconds.get(item.cell.id, usual) for item in plan}
    by_key = {item.cell.key: item for item in plan}
    chains = {item.cell.key: chain(item, by_key) for item in plan}
    needed = {key for keys in chains.values() for key in keys[1:]}
    loads, found = [0.0] * parts, [set() for _ in range(parts)]
    # A baseline that something here needs comes along with that; the others are cells like any other.
    heads = [item for item in plan if item.cell.key not in needed]
    heads.sort(key=lambda item: -sum(cost[key] for key in chains[item.cell.key]))  # stable: ties in the plan's order
    for item in heads:
        new = [[key for key in chains[item.cell.key] if key not in part] for part in found]
        totals = [load + sum(cost[key] for key in keys) for load, keys in zip(loads, new, strict=True)]
        free = totals == loads  # what takes no time is spread by number
        best = min(range(parts), key=lambda place: (0.0 if free else totals[place], len(found[place])))
        loads[best] = totals[best]
        found[best].update(new[best])
    return [[item for item in plan if item.cell.key in part] for part in found]


def chain(item: PlannedCell, by_key: Mapping[str, PlannedCell]) -> list[str]:
    """Keys of the cell and of what must run beside it: its baseline, and what that one is compared with."""
    keys = [item.cell.key]
    while item.skip is None and item.bench is None and item.baseline and item.baseline.key in by_key:
        item = by_key[item.baseline.key]
        keys.append(item.cell.key)
    return keys


def known_seconds(reports: Path) -> dict[str, float]:
    """How long each cell took when it last ran, by the evidence committed in `reports`; local runs differ by host."""
    from harness.report.history import find_runs, seconds_by_cell

    return seconds_by_cell([run for run in find_runs(reports) if run.folder.parent == reports])

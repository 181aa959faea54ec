"""The tasks of a rendered run: one cell each, grouped by what they take of a node.

A task runs its cell and the baselines it is compared with, so that tasks need nothing of each other; `merge` makes one
row of the baselines that several tasks ran.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from harness.frozen import Frozen
from harness.matrix import PlannedCell
from harness.need import need_of
from harness.shard import chain

#: Slurm's usual MaxArraySize is 1001, and a ConfigMap holds a MiB: larger groups are cut.
LARGEST = 1000


class Group(Frozen):
    """Tasks that take the same: `cells` by id, the index of a task being its place. Memory is of CPU ranks only."""

    name: str
    hardware: str
    gpus: int
    cores: int
    memory_bytes: int
    cells: tuple[str, ...]


class Tasks(NamedTuple):
    """`left_out`: id -> why no task runs it."""

    groups: tuple[Group, ...]
    left_out: dict[str, str]


def tasks_of(plan: Sequence[PlannedCell], gpus_per_node: int, cores_per_node: int) -> Tasks:
    """One task for each cell of `plan` that is not a baseline of another. What this host lacks does not matter here."""
    anywhere = [item.model_copy(update={"skip": None}) if _of_host(item) else item for item in plan]
    by_key = {item.cell.key: item for item in anywhere}
    chains = {item.cell.key: chain(item, by_key) for item in anywhere}
    needed = {key for keys in chains.values() for key in keys[1:]}
    found: dict[tuple[str, int, int, int], list[str]] = defaultdict(list)
    left_out: dict[str, str] = {}
    for item in anywhere:
        if item.cell.key in needed:
            continue
        needs = [need_of(by_key[key].cell, cores_per_node) for key in chains[item.cell.key]]
        gpus = max(need.gpus for need in needs)
        if item.skip is not None:
            left_out[item.cell.id] = item.skip
        elif gpus > gpus_per_node:
            left_out[item.cell.id] = f"needs {gpus} GPUs; a node has {gpus_per_node}"
        else:
            cores, memory = max(need.cores for need in needs), max(need.memory_bytes for need in needs)
            found[item.cell.hardware, gpus, cores, memory].append(item.cell.id)
    groups = []
    names: dict[str, int] = defaultdict(int)
    for (hardware, gpus, cores, memory), cells in found.items():
        for start in range(0, len(cells), LARGEST):
            name = f"{hardware}-{f'{gpus}gpu' if gpus else f'{cores}core'}"
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            groups.append(
                Group(
                    name=name, hardware=hardware, gpus=gpus, cores=cores, memory_bytes=memory,
                    cells=tuple(cells[start : start + LARGEST]),
                )
            )  # fmt: skip
    return Tasks(tuple(groups), left_out)


def _of_host(item: PlannedCell) -> bool:
    """Whether `skip` says something of this host only, and not that no host can run the cell."""
    return item.skip is not None and not item.skip.startswith("standard TP has no such layout")

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
#: Cores of a GPU task beside its ranks: the API server, the engine core and the harness.
SPARE_CORES = 3


class Group(Frozen):
    """Tasks that take the same: `cells` by id, the index of a task being its place. `memory_bytes`: 0 asks for none."""

    name: str
    hardware: str
    gpus: int
    cores: int
    memory_bytes: int
    cells: tuple[str, ...]


class Tasks(NamedTuple):
    """`left_out`: id -> why no task runs it. `runs`: ids of all that tasks run, in the plan's order, baselines too."""

    groups: tuple[Group, ...]
    left_out: dict[str, str]
    runs: tuple[str, ...]


def tasks_of(plan: Sequence[PlannedCell], gpus_per_node: int, cores_per_node: int, memory_bytes: int = 0) -> Tasks:
    """One task for each cell of `plan` that is not a baseline of another. What this host lacks does not matter here.

    `memory_bytes` of each task; 0: what ranks on a CPU need, and none asked for beside GPUs. A GPU task has spare cores
    as far as its part of the node's has them, so that as many tasks as have GPUs fit on a node.
    """
    anywhere = [item.model_copy(update={"skip": None}) if _of_host(item) else item for item in plan]
    by_key = {item.cell.key: item for item in anywhere}
    chains = {item.cell.key: chain(item, by_key) for item in anywhere}
    needed = {key for keys in chains.values() for key in keys[1:]}
    found: dict[tuple[str, int, int, int], list[str]] = defaultdict(list)
    left_out: dict[str, str] = {}
    run: set[str] = set()
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
            cores = max(need.cores for need in needs)
            if gpus:
                cores = max(cores, min(cores + SPARE_CORES, cores_per_node * gpus // gpus_per_node))
            memory = memory_bytes or max(need.memory_bytes for need in needs)
            found[item.cell.hardware, gpus, cores, memory].append(item.cell.id)
            run.update(chains[item.cell.key])
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
    return Tasks(tuple(groups), left_out, tuple(item.cell.id for item in anywhere if item.cell.key in run))


def _of_host(item: PlannedCell) -> bool:
    """Whether `skip` says something of this host only, and not that no host can run the cell."""
    return item.skip is not None and not item.skip.startswith("standard TP has no such layout")

"""Which hosts of a cluster can run a cell, and what the cell takes of them. Plain values; nothing is asked here."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.cell import Cell
from harness.executors.lent import Probe
from harness.executors.site import Site
from harness.frozen import Frozen
from harness.hardware import Hardware
from harness.models.recipe import PREFIX
from harness.need import Room, need_of
from harness.server.log import Cause


class ClusterError(ValueError):
    """The cluster cannot run cells; the text says why and what can be done."""


class Member(Frozen):
    """A living host. `node` and `address` are the cluster's names of it; `says`: the family that its label or custom
    resource names, "" where it names none."""

    node: str
    address: str = ""
    cores: int = 1
    gpus: int = 0
    says: str = ""
    probe: Probe

    @property
    def hardware(self) -> Iterator[Hardware]:
        """What it has, under the name that it gives to its GPUs."""
        for device in self.probe.hardware:
            yield device.model_copy(update={"family": self.says}) if self.says and device.family != "cpu" else device

    def has(self, family: str) -> bool:
        return self.says == family if self.says else any(device.family == family for device in self.probe.hardware)


class Placement(Frozen):
    """`hosts` bundles of so many GPUs and cores, each on a host of its own among `nodes`, for `ranks` of the cell."""

    hosts: int
    ranks: int
    gpus: int
    cores: int
    nodes: tuple[str, ...]


class Lack(NamedTuple):
    """Why no living host can run a cell, whatever is free."""

    reason: str
    cause: Cause


def place(cell: Cell, members: Sequence[Member], runtime: str = "process", cpu_ranks: int = 0) -> Placement | Lack:
    """What `cell` takes of which of `members`: of one host, or of the fewest that hold its ranks in equal parts.

    `cpu_ranks`: a host without GPUs takes no more ranks of one cell than this; 0 for as many as there are.
    """
    able = able_hosts(cell, members)
    if isinstance(able, Lack):
        return able
    on_gpus = cell.hardware != "cpu"
    ranks = need_of(cell, 1).gpus if on_gpus else cell.tp
    for hosts in (number for number in range(1, ranks + 1) if ranks % number == 0):
        each = ranks // hosts
        fit = [one for one in able if each <= (one.gpus if on_gpus else cpu_ranks or each)]
        if len(fit) < hosts:
            continue
        if hosts > 1 and runtime != "process":
            return Lack(f"needs {hosts} hosts, which containers do not span; --runtime process", Cause.OTHER)
        cores = min(each, max(one.cores for one in fit))
        nodes = tuple(sorted(one.node for one in fit))
        return Placement(hosts=hosts, ranks=each, gpus=each if on_gpus else 0, cores=max(cores, 1), nodes=nodes)
    lent = " + ".join(str(one.gpus if on_gpus else cpu_ranks) for one in able)
    return Lack(f"needs {ranks} {'GPUs' if on_gpus else 'ranks'}; the living hosts with {cell.hardware} lend {lent}",
                Cause.OTHER)  # fmt: skip


def able_hosts(cell: Cell, members: Sequence[Member]) -> list[Member] | Lack:
    """Those that have the cell's hardware, an image where one is needed, and its model or a hub to take it from."""
    there = [one for one in members if one.has(cell.hardware)]
    if not there:
        return Lack(f"no living host of the cluster has {cell.hardware}", Cause.OTHER)
    sound = [one for one in there if not one.probe.problem]
    if not sound:
        cause = Cause.MISSING_IMAGE if "image" in there[0].probe.problem else Cause.OTHER
        return Lack(f"no host can run it: {there[0].probe.host}: {there[0].probe.problem}", cause)
    made = cell.model.startswith(PREFIX)
    able = [one for one in sound if made or not one.probe.offline or cell.model in one.probe.models]
    if not able:
        told = f"no host of the cluster has {cell.model} in its cache, and all are offline"
        return Lack(told, Cause.MISSING_MODEL)
    return able


def agree(members: Sequence[Member], code: str) -> None:
    """ClusterError where a host runs other code than `code`, or hosts of one family have different versions."""
    if others := [one.probe.host for one in members if one.probe.code != code]:
        raise ClusterError(f"these hosts run other code of ours: {', '.join(others)}; bring them to this checkout")
    for family in families(members):
        there = [one for one in members if one.has(family)]
        if len({one.probe.versions for one in there}) > 1:
            told = "; ".join(f"{one.probe.host}: {', '.join(map(' '.join, one.probe.versions))}" for one in there)
            raise ClusterError(f"the hosts with {family} have different versions: {told}; run them apart, then merge")


def families(members: Sequence[Member]) -> list[str]:
    found = [family for one in members for family in ([one.says] if one.says else [d.family for d in one.hardware])]
    return list(dict.fromkeys(found))


def hardware_of(members: Sequence[Member]) -> list[Hardware]:
    """Each family, with the largest count of one host and how many hosts have that many."""
    found: dict[str, Hardware] = {}
    for device in (device for one in members for device in one.hardware):
        known = found.get(device.family)
        if known is None or device.count > known.count:
            found[device.family] = device
        elif device.count == known.count:
            found[device.family] = known.model_copy(update={"hosts": known.hosts + 1})
    return list(found.values())


def site_of(members: Sequence[Member]) -> Site:
    shown = hardware_of(members)
    names = {(device.family, device.name) for one in members for device in one.hardware}
    versions = {family: next(one.probe.versions for one in members if one.has(family)) for family in families(members)}
    return Site(
        hardware=tuple(map(str, shown)),
        kinds=tuple(f"{family} ({name})" for family, name in sorted(names)),
        versions=tuple(sorted(versions.items())),
    )


def largest_room(members: Sequence[Member]) -> Room:
    """The most cores and memory of one host, to tell which CPU cells fit on none."""
    cpus = [device for one in members for device in one.hardware if device.family == "cpu"]
    return Room(
        cores=max((device.count for device in cpus), default=1),
        memory_bytes=max((device.memory_bytes for device in cpus), default=0),
    )

"""Who is in a Ray cluster: every living host is asked once what it is; one that joins during a run is asked then."""

import contextlib
import threading
import time

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.executors.hosts import ClusterError, Member, agree
from harness.executors.lent import Probe, probe
from harness.resume import code_key
from harness.suite import Family

#: The label of a host, or the custom resource of that name, that says what it has: `hardware: hopper`, `hopper`.
LABEL = "hardware"
_AGE = 1.0  # seconds for which a look at the cluster holds


class Census:
    """`living` are the hosts that live and may be used. ClusterError where the first ones do not belong together."""

    def __init__(self, runtime: str):
        self._runtime = runtime
        self._ask = ray.remote(num_cpus=0, max_retries=2)(probe)
        self._lock = threading.Lock()
        self._code = code_key()
        self._asked: dict[str, ray.ObjectRef] = {}  # newcomers that have not answered
        self._probes: dict[str, Probe | None] = {}  # by node; None for one that is not used
        self._looked, self._living = 0.0, []
        nodes = {node["NodeID"]: node for node in _usable()}
        asked = {name: self._question(name) for name in nodes}
        for name, reference in asked.items():
            try:
                self._probes[name] = ray.get(reference)
            except (NodeDiedError, TaskUnschedulableError):  # lost a moment ago, and still listed as living
                self._probes[name] = None
            except RayError as problem:
                raise ClusterError(f"host {name[:8]} of the cluster does not answer: {problem}") from None
        known = ((node, self._probes[name]) for name, node in nodes.items())
        members = [_member(node, found) for node, found in known if found is not None]
        if not members:
            raise ClusterError("the cluster has no host with a CPU or GPU; add one: ray start --address HEAD:6379")
        agree(members, self._code)
        self._living = members

    def living(self) -> list[Member]:
        with self._lock:
            if time.monotonic() - self._looked > _AGE:
                nodes = {node["NodeID"]: node for node in _usable()}
                self._meet(nodes)
                known = ((node, self._probes.get(name)) for name, node in nodes.items())
                self._living = [_member(node, found) for node, found in known if found is not None]
                self._looked = time.monotonic()
            return self._living

    def _meet(self, nodes: dict[str, dict]) -> None:
        """Ask who is new, and take those in that answer and belong to the others."""
        for name in nodes:
            if name not in self._probes and name not in self._asked:
                self._asked[name] = self._question(name)
        for name, reference in list(self._asked.items()):
            if not ray.wait([reference], timeout=0)[0]:
                continue
            del self._asked[name]
            self._probes[name] = None  # other code or versions than the run began with, or gone again: not used
            with contextlib.suppress(RayError, ClusterError, KeyError):
                found = ray.get(reference)
                agree([*self._living, _member(nodes[name], found)], self._code)
                self._probes[name] = found

    def _question(self, name: str) -> ray.ObjectRef:
        there = NodeAffinitySchedulingStrategy(name, soft=False)
        return self._ask.options(scheduling_strategy=there).remote(self._runtime)


def _usable() -> list[dict]:
    """Living nodes that lend something; a head that only leads is none of them."""
    return [node for node in ray.nodes() if node["Alive"] and _lends(node)]


def _lends(node: dict) -> bool:
    return bool(node["Resources"].get("CPU", 0) or node["Resources"].get("GPU", 0))


def _member(node: dict, found: Probe) -> Member:
    resources = node["Resources"]
    named = (family for family in Family.__args__ if family in resources)
    return Member(
        node=node["NodeID"], address=node["NodeManagerAddress"], cores=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)), says=node.get("Labels", {}).get(LABEL, "") or next(named, ""), probe=found,
    )  # fmt: skip

"""Cells on the hosts of a Ray cluster: a placement group leases what a cell takes of one host, a task there runs it.

vLLM inside uses its own executor. The scheduler stays `harness.runner`; a lost host is an attempt lost to
infrastructure, which it makes again, elsewhere.
"""

import contextlib
import logging
import threading
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, TaskCancelledError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from harness.cell import Cell
from harness.executors.lent import Probe, probe, put_back, serve
from harness.executors.local import Attempt
from harness.frozen import content_hash
from harness.hardware import Hardware
from harness.lease import Cancelled
from harness.models.recipe import PREFIX
from harness.need import Room, need_of
from harness.resume import code_key
from harness.server.log import Cause, Failure
from harness.server.place import Place
from harness.server.process import Limits
from harness.transcript import Transcript

#: The label of a host, or the custom resource of an older cluster, that says what it has: `hardware: hopper`, `hopper`.
LABEL = "hardware"
#: Of a custom resource that only says where a cell may go.
_A_BIT = 0.001
_PATIENCE = 5.0  # seconds between looks at whether the run was interrupted


class ClusterError(ValueError):
    """The cluster cannot run cells; the text says why and what can be done."""


class RayExecutor:
    """Runs cells on the hosts of the Ray cluster at `address` (None: the one that this host is in, or a new one here).

    `room` and `place` replace what each host would lend, and where servers run there.
    """

    def __init__(
        self,
        address: str | None = None,
        runtime: str = "process",
        limits: Limits | None = None,
        room: Room | None = None,
        place: Place | None = None,
    ):
        self.runtime, self.limits, self.room, self.place = runtime, limits or Limits(), room, place
        self.cancel = threading.Event()
        if not ray.is_initialized():
            try:
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            except (ConnectionError, ValueError) as problem:
                raise ClusterError(f"--executor ray: {problem}; start one: ray start --head") from None
        self._lock = threading.Lock()
        self._leases: dict[str, PlacementGroup] = {}  # by cell key, for the next attempt; asked for, perhaps not there
        self._follow: dict[str, ray.ObjectRef] = {}
        self._running: set[ray.ObjectRef] = set()
        self._serve = ray.remote(max_retries=0)(serve)
        self.probes = self._ask_hosts()

    @property
    def hardware(self) -> list[Hardware]:
        """Each family of the cluster: as many GPUs as one host has, since a cell's server is on one host."""
        found: dict[str, Hardware] = {}
        for node in ray.nodes():
            family = _family(node)
            for device in self.probes[node["NodeID"]].hardware if node["NodeID"] in self.probes else ():
                here = device.model_copy(update={"family": family}) if family and device.family != "cpu" else device
                if here.family not in found or found[here.family].count < here.count:
                    found[here.family] = here
        return list(found.values())

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """Of what answers depend on, the same on all hosts."""
        return next(iter(self.probes.values())).versions

    @property
    def width(self) -> int:
        """How many cells may run at the same time: no more than there are GPUs, or hosts without one."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return max(1, int(sum(node.get("GPU", 0) or 1 for node in alive)))

    def reserve(self, cell: Cell, ask: bool = True) -> bool:
        """Ask for what `cell` takes, once; True as soon as some host gives it. A lack is left to the attempt."""
        if self._lack(cell):
            return True
        with self._lock:
            group = self._leases.get(cell.key)
            if group is None:
                group = self._leases[cell.key] = self._group(cell)
        return group.wait(timeout_seconds=0)

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt:
        """As `LocalExecutor.attempt`, on some host; what it left in its folder there is in `folder` afterwards."""
        if lack := self._lack(cell):
            return _lost(lack, Cause.MISSING_IMAGE if "image" in lack else Cause.MISSING_MODEL)
        with self._lock:
            group = self._leases.pop(cell.key, None) or self._group(cell)
        reference = None
        try:
            while not group.wait(timeout_seconds=_PATIENCE):
                if self.cancel.is_set():
                    raise Cancelled
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            bundle = group.bundle_specs[0]
            reference = self._serve.options(
                scheduling_strategy=strategy, num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0)
            ).remote(cell, self._put(follow), ask, self.runtime, self.limits, self.room, self.place)
            self._running.add(reference)
            served = self._wait(reference)
            put_back(served.files, folder)
            return served.attempt
        except RayTaskError as problem:
            raise problem.as_instanceof_cause() from None
        except TaskCancelledError:
            raise Cancelled from None
        except RayError as problem:
            said = str(problem).strip().splitlines() or [""]
            return _lost(f"its host was lost: {type(problem).__name__}: {said[0]}", Cause.KILLED)
        finally:
            self._running.discard(reference)
            with contextlib.suppress(Exception):  # the cluster may be gone
                remove_placement_group(group)

    def give_back(self) -> None:
        """Give back what was asked for ahead and not used."""
        with self._lock:
            groups, self._leases = list(self._leases.values()), {}
        for group in groups:
            with contextlib.suppress(Exception):  # the cluster may be gone
                remove_placement_group(group)

    def end_all(self) -> None:
        """End every running cell now; the guards of its server see to what is left."""
        self.cancel.set()
        for reference in list(self._running):
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)

    def _wait(self, reference: ray.ObjectRef):
        asked = False
        while True:
            try:
                return ray.get(reference, timeout=_PATIENCE)
            except GetTimeoutError:
                if self.cancel.is_set() and not asked:
                    ray.cancel(reference)  # the task stops its server, and then raises
                    asked = True

    def _group(self, cell: Cell) -> PlacementGroup:
        """STRICT_PACK of one bundle: all of it on one host, with the cell's hardware where hosts say what they have."""
        need = need_of(cell, max((int(node["Resources"].get("CPU", 1)) for node in ray.nodes()), default=1))
        bundle: dict[str, float] = {"CPU": need.cores}
        if need.gpus:
            bundle["GPU"] = need.gpus
        alive = [node for node in ray.nodes() if node["Alive"]]
        selector = None
        if any(LABEL in node.get("Labels", {}) for node in alive):
            selector = [{LABEL: cell.hardware}]
        elif any(cell.hardware in node["Resources"] for node in alive):
            bundle[cell.hardware] = _A_BIT
        return placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=selector)

    def _put(self, follow: Transcript | None) -> ray.ObjectRef | None:
        """A baseline's transcript travels to the cluster once, not once a cell."""
        if follow is None:
            return None
        key = content_hash([follow.cell_key, follow.digest()])
        with self._lock:
            if key not in self._follow:
                self._follow[key] = ray.put(follow)
            return self._follow[key]

    def _ask_hosts(self) -> dict[str, Probe]:
        """Every living host, by Ray's id of it. ClusterError where one runs other code of ours, or none can run."""
        ask = ray.remote(num_cpus=0, max_retries=2)(probe)
        asked = {
            node["NodeID"]: ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(self.runtime)
            for node in ray.nodes()
            if node["Alive"]
        }
        found = {}
        for node, reference in asked.items():
            try:
                found[node] = ray.get(reference)
            except RayError as problem:
                raise ClusterError(f"host {node[:8]} of the cluster does not answer: {problem}") from None
        here = code_key()
        if others := [one.host for one in found.values() if one.code != here]:
            raise ClusterError(f"these hosts run other code of ours: {', '.join(others)}; bring them to this checkout")
        if len({one.versions for one in found.values()}) > 1:
            told = "; ".join(f"{one.host}: {', '.join(map(' '.join, one.versions))}" for one in found.values())
            raise ClusterError(f"the hosts have different versions: {told}; run them apart, then merge")
        return found

    def _lack(self, cell: Cell) -> str | None:
        """Why no host can run `cell`, whatever is free: no image, or no model and no hub."""
        able = [one for one in self.probes.values() if any(have.family == cell.hardware for have in one.hardware)]
        able = able or list(self.probes.values())
        if all(one.problem for one in able):
            return f"no host can run it: {able[0].host}: {able[0].problem}" if able else "the cluster has no host"
        if cell.model.startswith(PREFIX) or any(not one.offline or cell.model in one.models for one in able):
            return None
        return f"no host of the cluster has {cell.model} in its cache, and all are offline"


def _family(node: dict) -> str:
    """What a host says it has, by its label; "" where it does not say."""
    return node.get("Labels", {}).get(LABEL, "")


def _lost(reason: str, cause: Cause) -> Attempt:
    return Attempt(False, Failure(cause=cause, reason=reason, log_tail=""), None, (), None, "", ())

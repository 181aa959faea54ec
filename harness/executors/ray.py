"""Cells on the hosts of a Ray cluster: a placement group leases what a cell takes, a task there runs it.

vLLM inside uses its own executor. The scheduler stays `harness.runner`; a lost host is an attempt lost to
infrastructure, which it makes again, elsewhere. A cell that no living host can run ends with that as its reason.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.cell import Cell
from harness.executors import spread
from harness.executors.census import Census
from harness.executors.hosts import ClusterError, Lack, Placement, hardware_of, largest_room, place, site_of
from harness.executors.lent import Served, put_back, serve
from harness.executors.local import Attempt
from harness.executors.site import Site
from harness.frozen import content_hash
from harness.hardware import Hardware
from harness.lease import Cancelled
from harness.need import Room
from harness.server.log import Cause, Failure
from harness.server.place import Place
from harness.server.process import Limits
from harness.transcript import Transcript

__all__ = ["ClusterError", "RayExecutor"]

_NODE = "ray.io/node-id"  # a label that every node has
_ASKED = 8  # so many cells wait for hosts at the same time
_PATIENCE = 5.0  # seconds between looks at whether the run was interrupted, or a host was lost


class _Lease(NamedTuple):
    """A placement group that was asked for; perhaps it is not there yet."""

    group: PlacementGroup
    placement: Placement


class Bell:
    """Rung when the first host of a server has ended, however it did."""

    def __init__(self) -> None:
        self._rung = False

    def ring(self) -> None:
        self._rung = True

    def rung(self) -> bool:
        return self._rung


class RayExecutor:
    """Runs cells on the hosts of the Ray cluster at `address` (None: the one that this host is in).

    Raises ClusterError where there is none, or its hosts do not belong together.
    `room` and `place` replace what each host would lend, and where servers run there. `cpu_ranks`: a host without GPUs
    takes at most so many ranks of one cell, more go to further hosts; 0 for no such limit.
    """

    def __init__(
        self,
        address: str | None = None,
        runtime: str = "process",
        limits: Limits | None = None,
        room: Room | None = None,
        place: Place | None = None,
        cpu_ranks: int = 0,
    ):
        self.runtime, self.limits, self.room, self.place = runtime, limits or Limits(), room, place
        self.cpu_ranks = cpu_ranks
        self.cancel = threading.Event()
        if not ray.is_initialized():
            try:
                _reach(address)
                ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, ValueError) as problem:
                raise ClusterError(f"--executor ray: {problem}; start one: ray start --head") from None
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}  # by cell key, for the next attempt
        self._follow: dict[str, ray.ObjectRef] = {}
        self._running: set[ray.ObjectRef] = set()
        self._serve, self._lead = (ray.remote(max_retries=0)(task) for task in (serve, spread.lead))
        self._along = ray.remote(max_retries=0)(_follow_along)
        self._port = ray.remote(num_cpus=0)(spread.free_port)
        self.census = Census(runtime)
        self.site: Site = site_of(self.census.living())  # as the run began: a lost host changes no answer

    @property
    def hardware(self) -> list[Hardware]:
        return hardware_of(self.census.living())

    @property
    def hosts(self) -> int:
        return len(self.census.living())

    @property
    def largest(self) -> Room:
        """Cores and memory of the largest CPU host: a CPU cell that takes more can run nowhere."""
        return largest_room(self.census.living())

    @property
    def width(self) -> int:
        """How many cells may run at the same time: no more than there are GPUs, or hosts without one."""
        return max(1, sum(one.gpus or 1 for one in self.census.living()))

    def reserve(self, cell: Cell, ask: bool = True) -> bool | None:
        """Ask for what `cell` takes, once; True as soon as hosts give it. A lack is left to the attempt.

        None: hosts have not given it yet, or it was not asked for, since enough others wait. It never counts as a miss:
        what is granted meanwhile, and holds GPUs, is found behind any number that wait.
        """
        if cell.key not in self._leases and len(self._leases) > _ASKED:
            return None
        placed = self._place(cell)
        if isinstance(placed, Lack):
            self._drop(cell)
            return True
        with self._lock:
            held = self._leases[cell.key] = self._current(self._leases.get(cell.key), placed)
        return held.group.wait(timeout_seconds=0) or None

    def give_back(self) -> None:
        """Release what is reserved and was not used."""
        with self._lock:
            held, self._leases = list(self._leases.values()), {}
        for lease in held:
            _remove(lease.group)

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt:
        """As `LocalExecutor.attempt`, on some hosts; what it left in its folder there is in `folder` afterwards."""
        with self._lock:
            held = self._leases.pop(cell.key, None)
        try:
            while True:
                placed = self._place(cell)
                if isinstance(placed, Lack):
                    return _lost(placed.reason, placed.cause)
                held = self._current(held, placed)
                if held.group.wait(timeout_seconds=_PATIENCE):
                    break
                if self.cancel.is_set():
                    raise Cancelled
            run = self._on_one if held.placement.hosts == 1 else self._on_several
            return run(cell, folder, follow, ask, held)
        except RayTaskError as problem:
            raise problem.as_instanceof_cause() from None
        except TaskCancelledError:
            raise Cancelled from None
        except RayError as problem:
            said = str(problem).strip().splitlines() or [""]
            return _lost(f"its host was lost: {type(problem).__name__}: {said[0]}", Cause.KILLED)
        finally:
            if held is not None:
                _remove(held.group)

    def end_all(self) -> None:
        """End every running cell now; the guards of its server see to what is left."""
        self.cancel.set()
        self.give_back()
        for reference in list(self._running):
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)

    def _place(self, cell: Cell) -> Placement | Lack:
        return place(cell, self.census.living(), self.runtime, self.cpu_ranks)

    def _current(self, held: _Lease | None, placed: Placement) -> _Lease:
        """`held` where it is granted or still what would be asked for; else asked anew, as hosts came or went."""
        if held is not None and (held.placement == placed or held.group.wait(timeout_seconds=0)):
            return held
        if held is not None:
            _remove(held.group)
        return _Lease(_group(placed), placed)

    def _drop(self, cell: Cell) -> None:
        with self._lock:
            held = self._leases.pop(cell.key, None)
        if held is not None:
            _remove(held.group)

    def _on_one(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool, held: _Lease) -> Attempt:
        reference = self._serve.options(**_in_bundle(held, 0)).remote(
            cell, self._put(follow), ask, self.runtime, self.limits, self.room, self.place
        )
        served = self._wait([reference], held)
        if isinstance(served, Attempt):
            return served
        put_back(served.files, folder)
        return served.attempt

    def _on_several(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool, held: _Lease) -> Attempt:
        """Host 0 asks and comes back; the others are told then, and give their proofs. One that ends early ends all."""
        address = {one.node: one.address for one in self.census.living()}
        nodes = placement_group_table(held.group)["bundles_to_node_id"]
        if not all(node in address for node in nodes.values()):
            return _lost("one of its hosts was lost before its server started", Cause.KILLED)
        own = [address[nodes[number]] for number in range(held.placement.hosts)]
        port = ray.get(self._port.options(**_in_bundle(held, 0, nothing=True)).remote(own[0]))
        parts = [
            spread.Part(number=number, hosts=len(own), ranks=held.placement.ranks, own=here, master=own[0], port=port)
            for number, here in enumerate(own)
        ]
        bell = ray.remote(num_cpus=0)(Bell).options(**_in_bundle(held, 0, nothing=True)).remote()
        common = (self.limits, self.room, self.place)
        first = self._lead.options(**_in_bundle(held, 0)).remote(cell, self._put(follow), ask, parts[0], *common)
        others = [
            self._along.options(**_in_bundle(held, part.number)).remote(cell, part, *common, bell) for part in parts[1:]
        ]
        try:
            served = self._wait([first, *others], held)
        finally:
            with contextlib.suppress(RayError):
                ray.get(bell.ring.remote())
        if isinstance(served, Attempt):
            return served
        put_back(served.files, folder)
        followed = ray.get(others, timeout=self.limits.stop + 60)
        for number, one in enumerate(followed, 1):
            put_back(one.files, folder / f"host-{number}")
        proofs = sorted((*served.attempt.proofs, *(proof for one in followed for proof in one.proofs)), key=_rank)
        return served.attempt._replace(proofs=tuple(proofs))

    def _wait(self, references: Sequence[ray.ObjectRef], held: _Lease) -> Served | Attempt:
        """What the first of `references` gives, or the attempt as lost where another ended before it, or all hosts did.

        Ray cancels a task by an interrupt in it: it stops its server, and then ends.
        """
        self._running.update(references)
        asked = False
        try:
            while True:
                done, _ = ray.wait(list(references), num_returns=1, timeout=_PATIENCE)
                if references[0] in done:
                    return ray.get(references[0])
                if done:
                    return self._without_first(references[0], ray.get(done[0]))
                if self.cancel.is_set() and not asked:
                    ray.cancel(references[0])
                    asked = True
                if not {one.node for one in self.census.living()} & set(held.placement.nodes):
                    ray.cancel(references[0], force=True)
                    return _lost("its host was lost, and no other one of its kind lives", Cause.OTHER)
        finally:
            self._running.difference_update(references)

    def _without_first(self, first: ray.ObjectRef, ended: spread.Followed) -> Attempt:
        ray.cancel(first, force=True)
        failure = ended.failure or Failure(cause=Cause.OTHER, reason="its headless ranks ended")
        told = f"host {ended.host} of its server: {failure.reason}"
        return _lost(told, failure.cause)._replace(log_tail=failure.log_tail)

    def _put(self, follow: Transcript | None) -> ray.ObjectRef | None:
        """A baseline's transcript travels to the cluster once, not once a cell."""
        if follow is None:
            return None
        key = content_hash([follow.cell_key, follow.digest()])
        with self._lock:
            if key not in self._follow:
                self._follow[key] = ray.put(follow)
            return self._follow[key]


def _follow_along(cell: Cell, part: spread.Part, limits: Limits, room: Room | None, place: Place | None, bell):
    def over() -> bool:
        try:
            return ray.get(bell.rung.remote())
        except RayError:  # it lived on the first host
            return True

    return spread.follow_along(cell, part, limits, room, place, over)


def _group(placed: Placement) -> PlacementGroup:
    """STRICT_PACK of one bundle, or STRICT_SPREAD of one a host, on the hosts that can run the cell."""
    bundle: dict[str, float] = {"CPU": placed.cores} | ({"GPU": placed.gpus} if placed.gpus else {})
    only = {_NODE: f"in({','.join(placed.nodes)})"}
    strategy = "STRICT_PACK" if placed.hosts == 1 else "STRICT_SPREAD"
    return placement_group([bundle] * placed.hosts, strategy=strategy, bundle_label_selector=[only] * placed.hosts)


def _in_bundle(held: _Lease, number: int, nothing: bool = False) -> dict:
    """Options of a task that takes all of a bundle, or `nothing` of it."""
    strategy = PlacementGroupSchedulingStrategy(held.group, placement_group_bundle_index=number)
    placed = held.placement
    return {
        "scheduling_strategy": strategy,
        "num_cpus": 0 if nothing else placed.cores,
        "num_gpus": 0 if nothing else placed.gpus,
    }


def _remove(group: PlacementGroup) -> None:
    with contextlib.suppress(Exception):  # the cluster may be gone
        remove_placement_group(group)


def _rank(proof) -> int:
    return proof.rank


def _lost(reason: str, cause: Cause) -> Attempt:
    return Attempt(False, Failure(cause=cause, reason=reason, log_tail=""), None, (), None, "", ())


def _reach(address: str | None) -> None:
    """Raises OSError where nobody answers at `HOST:PORT`: Ray itself would go on trying for minutes, without a word."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # a name that Ray knows, or refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as problem:
        raise ConnectionError(f"nobody answers at {address} ({problem})") from None

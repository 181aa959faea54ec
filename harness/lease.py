"""Leases of this host's scarce things across processes: GPUs, ports, cores, memory.

A lease is an exclusive `flock` on a small file that says what is held, so the kernel gives it back when its holder
dies, however it dies. The guard of a server holds the same open file: what a killed harness had stays leased until its
server is gone. All users and all harnesses of a host share one folder, unless `HELIX_LEASES` names another. Ports are
leased by names in the network namespace: whoever shares it shares them, whatever its folder.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from harness.gpus import GpuMemory, memory_of, visible
from harness.need import Need, Room, host_cores, host_memory

#: Below Linux's ephemeral range, so that no outgoing connection sits on a leased port.
PORTS = range(21000, 29000)
#: Seconds after which a lease that is waited for is kept free for who waits, so that small ones do not starve it.
PATIENCE = 5.0
_ROUNDING = 1e-6  # shares of a GPU that add up to a whole, in floating point
_numbers = itertools.count()


class Cancelled(Exception):
    """The run was interrupted while it waited for a lease."""


def lease_folder() -> Path:
    """Where lease files lie: one folder for all harnesses on this host. Raises OSError where it cannot be made."""
    folder = Path(os.environ.get("HELIX_LEASES") or "/tmp/helix-leases")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
    return folder


class Lease:
    """GPUs, cores, memory and a port on 127.0.0.1, held until `release`. `descriptor` is for the server's guard.

    `before`: of each GPU, the memory in use before any server of those that share it now.
    """

    def __init__(
        self,
        need: Need,
        before: Mapping[str, GpuMemory | None],
        path: Path,
        descriptor: int,
        resources: contextlib.ExitStack,
    ):
        self.need = need
        self.gpus = tuple(before)
        self.descriptor = descriptor
        self.port = 0
        self._path = path
        self._resources = resources
        self._before = before

    def release(self, patience: float = 30.0) -> str | None:
        """Give everything back. Returns what is wrong with a GPU whose memory did not come free; that one stays leased,
        to nobody, until it is free."""
        try:
            stuck = self._stuck(patience)
            for gpu, _, before in stuck:
                _quarantine(gpu, before)
        finally:
            self._path.unlink(missing_ok=True)
            self._resources.close()
        if not stuck:
            return None
        told = ", ".join(f"GPU {gpu} {memory}" for gpu, memory, _ in stuck)
        return f"GPU memory was not given back within {patience:.0f} s: {told}; the GPU is quarantined until it is"

    def _stuck(self, patience: float) -> list[tuple[str, GpuMemory, GpuMemory]]:
        """(GPU, its memory now, its memory before) of each that is not as free as it was."""
        until = time.monotonic() + patience
        while True:
            shared = self._shared()  # what others use there tells nothing about this server
            pairs = [(gpu, memory_of(gpu), before) for gpu, before in self._before.items() if gpu not in shared]
            stuck = [(gpu, now, before) for gpu, now, before in pairs if now and before and not now.free_again(before)]
            if not stuck or time.monotonic() > until:
                return stuck
            time.sleep(0.5)

    def _shared(self) -> set[str]:
        """GPUs of this lease that others hold parts of."""
        if self.need.share >= 1.0:
            return set()
        with _one_at_a_time():
            return {gpu for other in _held("lease", but=self._path) for gpu in other["gpus"]}


class Host:
    """What this host lends. `take` gives a lease or None at once; `wait` waits for it."""

    def __init__(self, room: Room | None = None):
        self.room = room or Room(gpus=visible(), cores=host_cores(), memory_bytes=host_memory())

    def take(self, need: Need, ticket: "Ticket | None" = None) -> Lease | None:
        """A lease, or None while others hold too much of what it takes, or an older ticket than `ticket` waits for it.

        ValueError when this host lacks it for good.
        """
        return self._take(need, ticket or Ticket(need))

    def opens(self, need: Need) -> bool:
        """Whether so many GPUs are not quarantined: what waits for more must not keep others waiting."""
        return need.gpus <= len(self.room.gpus) - len(_quarantined() & set(self.room.gpus))

    def wait(self, need: Need, cancel: threading.Event) -> Lease:
        """As `take`, as soon as others give enough back. Raises Cancelled."""
        with Ticket(need) as ticket:
            while (lease := self._take(need, ticket)) is None:
                if cancel.wait(0.3):
                    raise Cancelled
                ticket.age()
        return lease

    def _take(self, need: Need, ticket: "Ticket") -> Lease | None:
        if lack := self.room.lacks(need):
            raise ValueError(lack)
        with _one_at_a_time():
            holders = _held("lease")
            older = sorted(_held("want", before=ticket.since, but=ticket.path), key=lambda want: want["since"])
            closed = _quarantined()
            taken = {
                gpu: sum(other["share"] for other in holders if gpu in other["gpus"])
                for gpu in self.room.gpus
                if gpu not in closed
            }
            for want in older:
                _set_aside(want, taken)
            gpus = [gpu for gpu in taken if taken[gpu] + need.share <= 1.0 + _ROUNDING]
            gpus.sort(key=lambda gpu: -taken[gpu])  # a GPU that is shared already, so that others stay whole
            cores = self.room.cores - sum(other["cores"] for other in (*holders, *older))
            memory = self.room.memory_bytes - sum(other["memory"] for other in (*holders, *older))
            if need.gpus > len(gpus) or need.cores > cores or need.memory_bytes > memory:
                return None
            resources = contextlib.ExitStack()
            try:
                chosen = gpus[: need.gpus]
                before = {gpu: _before(gpu, holders) for gpu in chosen}
                path, descriptor = _write("lease", need, chosen, before=before)
                resources.callback(os.close, descriptor)
                lease = Lease(need, before, path, descriptor, resources)
                lease.port = resources.enter_context(lease_port())
                return lease
            except BaseException:
                resources.close()
                raise


class Ticket:
    """A request for a lease. Once it is older than PATIENCE, later requests, of any harness, leave room for it."""

    def __init__(self, need: Need):
        self.need = need
        self.since = time.monotonic()
        self.path: Path | None = None
        self._descriptor = -1

    @property
    def old(self) -> bool:
        return self.path is not None

    def age(self) -> None:
        """Called now and then while waiting."""
        if self.path is None and time.monotonic() - self.since > PATIENCE:
            with _one_at_a_time():
                self.path, self._descriptor = _write("want", self.need, (), self.since)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self.path = None


def _set_aside(want: dict, taken: dict[str, float]) -> None:
    """Count as taken what an older request would get now; or, where it gets nothing, the emptiest GPUs, to come free.

    Nothing for what waits for more GPUs than are not quarantined.
    """
    wanted, share = want["waits_for"], want["share"]
    if wanted > len(taken):
        return
    fitting = sorted((gpu for gpu in taken if taken[gpu] + share <= 1.0 + _ROUNDING), key=lambda gpu: -taken[gpu])
    for gpu in (fitting if len(fitting) >= wanted else sorted(taken, key=taken.__getitem__))[:wanted]:
        taken[gpu] += share


def _before(gpu: str, holders: Sequence[dict]) -> GpuMemory | None:
    """What was in use on `gpu` before any of those that hold a part of it now."""
    told = [other["before"][gpu] for other in holders if gpu in other["before"]]
    return GpuMemory(*min(told)) if told else memory_of(gpu)


def _write(
    kind: str,
    need: Need,
    gpus: Sequence[str],
    since: float = 0.0,
    before: Mapping[str, GpuMemory | None] = MappingProxyType({}),
) -> tuple[Path, int]:
    """A locked file that says what is held, or waited for; and its descriptor."""
    held = {
        "pid": os.getpid(), "cores": need.cores, "memory": need.memory_bytes, "gpus": list(gpus), "share": need.share,
        "before": {gpu: list(memory) for gpu, memory in before.items() if memory},
        "waits_for": need.gpus if kind == "want" else 0, "since": since,
    }  # fmt: skip
    path = lease_folder() / f"{kind}-{os.getpid()}-{next(_numbers)}.json"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, json.dumps(held).encode())
    return path, descriptor


def _held(kind: str, before: float = float("inf"), but: Path | None = None) -> list[dict]:
    """What living holders hold. Files of dead ones are removed."""
    found = []
    for path in lease_folder().glob(f"{kind}-*.json"):
        if path == but:
            continue
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _locked(descriptor):
                    path.unlink()
                    continue
                held = _understood(json.loads(os.pread(descriptor, 65536, 0)))
                if held["since"] < before:
                    found.append(held)
            finally:
                os.close(descriptor)
    return found


def _understood(record: object) -> dict:
    """What is held, as far as this version understands `record`; another version's may lack fields, or have more."""
    known = {"cores": 0, "memory": 0, "gpus": [], "share": 1.0, "before": {}, "waits_for": 0, "since": 0.0}
    told = record if isinstance(record, dict) else {}
    numbers = {name: told[name] for name in known if isinstance(told.get(name), int | float)}
    gpus = told["gpus"] if isinstance(told.get("gpus"), list) else []
    before = told["before"] if isinstance(told.get("before"), dict) else {}
    return {**known, **numbers, "gpus": [str(gpu) for gpu in gpus], "before": before}


def _quarantine(gpu: str, before: GpuMemory) -> None:
    """In a file of this process's own: one of another user's cannot be overwritten in a shared folder."""
    path = lease_folder() / f"quarantine-{gpu}-{os.getpid()}.json"
    path.write_text(json.dumps({"gpu": gpu, "used": before.used, "total": before.total}))


def _quarantined() -> set[str]:
    """GPUs whose memory some server did not give back. One that is as free as before that server is let out."""
    found = set()
    for path in lease_folder().glob("quarantine-*.json"):
        with contextlib.suppress(OSError, ValueError):
            held = json.loads(path.read_text())
            memory = memory_of(held["gpu"])
            if memory and memory.free_again(GpuMemory(held["used"], held["total"])):
                path.unlink(missing_ok=True)
            else:
                found.add(held["gpu"])
    return found


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    descriptor = _open_shared(lease_folder() / "host.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lease_port(ports: range = PORTS) -> Iterator[int]:
    """A port on 127.0.0.1 that no other harness holds and nothing listens on. RuntimeError when there is none.

    Held by an abstract socket's name, which the kernel keeps for each network namespace and frees with its holder.
    """
    start = os.getpid() % len(ports)  # runs that start together look at different ports first
    for port in (ports[(start + step) % len(ports)] for step in range(len(ports))):
        with socket.socket(socket.AF_UNIX) as name:
            if _named(name, f"helix-port-{port}") and _free(port):
                yield port
                return
    raise RuntimeError(f"no free port on 127.0.0.1 from {ports.start} to {ports.stop - 1}")


def _open_shared(path: Path) -> int:
    """A descriptor to lock by. Another user's file is opened without O_CREAT, which a sticky folder would refuse."""
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(holder: socket.socket, name: str) -> bool:
    """Whether `holder` got the abstract `name`, which one socket has at a time."""
    try:
        holder.bind(f"\0{name}")
    except OSError as problem:
        if problem.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

"""The driver's side of a simulated fleet: leases GPUs of its hosts, sends attempts there, takes back what they left."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from types import TracebackType

import psutil
import stub_fleet
from test_runner import failed

from harness.cell import Cell
from harness.executors.lent import Served, put_back
from harness.executors.local import Attempt
from harness.server.log import Cause
from harness.transcript import Transcript


class Fleet:
    """An executor on `hosts` processes that stand for hosts of `gpus` GPUs; a context manager for them.

    A cell takes its TP on one of them, the fullest that fits. `stub` says how the nth server of a cell behaves. The
    host of some cell is killed when `lose` attempts have begun: one whose cells all behave well.
    """

    def __init__(self, hosts: int, gpus: int, stub: Callable[[Cell, int], stub_fleet.Stub], lose: int):
        self.free = dict.fromkeys(range(hosts), gpus)
        self.gpus, self.stub, self.lose = gpus, stub, lose
        self.cancel = threading.Event()
        self.lock = threading.Lock()
        self.reserved: dict[str, int] = {}
        self.kept: set[int] = set()  # hosts that a cell which runs again waits for
        self.running: dict[int, list[tuple[int, stub_fleet.Stub]]] = {host: [] for host in self.free}  # (try, server)
        self.begun: dict[str, int] = {}
        self.lost: list[str] = []  # keys of the cells that ran on the lost host
        self.changes: list[tuple[float, int, int]] = []  # (time, GPUs leased, GPUs there are)
        self.last_reserved = 0.0

    def __enter__(self) -> "Fleet":
        self.folder = tempfile.TemporaryDirectory(prefix="fleet-")
        command = [sys.executable, stub_fleet.__file__, self.folder.name, str(len(self.free)), str(self.gpus)]
        self.hosts = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pids = dict(map(int, self.hosts.stdout.readline().split()) for _ in self.free)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        times = [psutil.Process(pid).cpu_times() for pid in self.pids.values()]
        self.cpu_seconds = sum(used.user + used.system for used in times)  # of the hosts that live
        self.hosts.stdin.close()
        self.hosts.wait()
        self.hosts.stdout.close()
        self.folder.cleanup()

    def reserve(self, cell: Cell, ask: bool = True) -> bool:
        with self.lock:
            fits = [host for host, free in self.free.items() if free >= cell.tp and host not in self.kept]
            if fits:
                self._lease(cell, min(fits, key=self.free.__getitem__))
            return bool(fits)

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt:
        host = self.reserved.pop(cell.key, None)
        host = self._wait(cell) if host is None else host
        running = self._begin(cell, host)
        try:
            with Client(str(Path(self.folder.name) / str(host))) as line:
                line.send(stub_fleet.Order(cell, follow, running[1]))
                served: Served | Exception = line.recv()
        except (EOFError, OSError) as problem:
            self.lost.append(cell.key)
            return failed(cell, Cause.KILLED, f"its host was lost: {type(problem).__name__}")
        finally:
            self._end(cell, host, running)
        if isinstance(served, Exception):
            raise served
        put_back(served.files, folder)
        return served.attempt

    def give_back(self) -> None: ...

    def end_all(self) -> None:
        self.cancel.set()

    @property
    def seconds(self) -> float:
        return self.changes[-1][0] - self.changes[0][0]

    @property
    def share(self) -> float:
        """GPU time leased over GPU time there was, from the first lease until the last cell was leased."""
        spans = [
            (min(then, self.last_reserved) - now, used, there)
            for (now, used, there), (then, _, _) in zip(self.changes, self.changes[1:], strict=False)
            if now < self.last_reserved
        ]
        return sum(span * used for span, used, _ in spans) / sum(span * there for span, _, there in spans)

    def _wait(self, cell: Cell) -> int:
        """A host for a cell that runs again: it is left to empty, as whoever waits longest comes first."""
        kept = None
        while True:
            with self.lock:
                able = [host for host in self.free if host == kept or host not in self.kept] or list(self.free)
                kept = kept if kept in able else max(able, key=self.free.__getitem__)
                self.kept.add(kept)
                if self.free[kept] >= cell.tp:
                    self.kept.discard(kept)
                    self._lease(cell, kept)
                    return self.reserved.pop(cell.key)
            time.sleep(0.1)

    def _lease(self, cell: Cell, host: int) -> None:
        self.free[host] -= cell.tp
        self.reserved[cell.key] = host
        self._note()
        self.last_reserved = self.changes[-1][0]

    def _begin(self, cell: Cell, host: int) -> tuple[int, stub_fleet.Stub]:
        with self.lock:
            number = self.begun[cell.key] = self.begun.get(cell.key, 0) + 1
            running = number, self.stub(cell, number)
            self.running[host].append(running)
            self.lose -= 1
            if self.lose <= 0 and len(self.pids) == len(self.running):
                self._lose()
        return running

    def _lose(self) -> None:
        """Kill a host that only runs cells which nothing else is lost of, and so pass when they run again."""
        for host, there in self.running.items():
            if there and all(number == 1 and stub.behaviour not in stub_fleet.STOPS for number, stub in there):
                os.kill(self.pids.pop(host), signal.SIGKILL)
                del self.free[host]
                return

    def _end(self, cell: Cell, host: int, running: tuple[int, stub_fleet.Stub]) -> None:
        with self.lock:
            self.running[host].remove(running)
            if host in self.free:
                self.free[host] += cell.tp
            self._note()

    def _note(self) -> None:
        there = self.gpus * len(self.free)
        self.changes.append((time.monotonic(), there - sum(self.free.values()), there))

"""Counters that live on the device, for work that Python does not see: the replays of a captured CUDA graph.

Python runs once, when a graph is captured, and never when it is replayed. An addition to a tensor is captured with the
rest and runs with every replay. Nothing waits for the device: a thread copies the counters out from time to time.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch


class DeviceCounters:
    """int64 counters by name in one tensor on `device`.

    `together`: names that are bumped at once, by one kernel; their increments are made now, because nothing may be
    allocated while a graph is captured.
    """

    def __init__(self, device: torch.device | str, names: Sequence[str], together: Sequence[tuple[str, ...]] = ()):
        self.names = tuple(names)
        self.values = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.step = torch.zeros_like(self.values)
        self.follows = False  # whether a graph adds `step`
        self._index = {name: index for index, name in enumerate(self.names)}
        self._increments = {key: self._increment(key) for key in (*((name,) for name in self.names), *together)}

    def bump(self, *names: str) -> None:
        """Add 1 to each of `names`, which is one of `together` or one name: one addition on the current stream."""
        self.values.add_(self._increments[names])

    def bump_step(self) -> None:
        """Add what `set_step` last said: for a captured graph that is replayed for steps of several kinds."""
        self.follows = True
        self.values.add_(self.step)

    def set_step(self, which: torch.Tensor, yes: tuple[str, ...], no: tuple[str, ...]) -> None:
        """`bump_step` adds 1 to each of `yes` where `which` (one bool on the device) holds, else to each of `no`."""
        self.step.copy_(torch.where(which, self._increments[yes], self._increments[no]))

    def add(self, name: str, by: torch.Tensor | int) -> None:
        """Add a number, or a tensor of one integer on the same device, without waiting for it."""
        self.values[self._index[name]].add_(by)

    def reset(self) -> None:
        self.values.zero_()

    def read(self) -> list[int]:
        """The values now. Waits for a copy, not for the device's current stream: work that is queued may be missing."""
        cuda = self.values.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.values.device)) if cuda else nullcontext():
            return self.values.tolist()

    def _increment(self, names: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor([int(name in names) for name in self.names], dtype=torch.int64, device=self.values.device)


class Publisher:
    """A thread that hands `read()`'s values to `write` every `seconds`, and once more when it is closed.

    Start it after all graphs are captured: a copy from another thread would spoil a capture.
    """

    def __init__(self, counters: DeviceCounters, write: Callable[[list[int]], None], seconds: float):
        self._counters, self._write, self._seconds = counters, write, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="helix-proof", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self._write(self._counters.read())
        self._write(self._counters.read())

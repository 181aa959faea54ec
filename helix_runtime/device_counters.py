"""Counters that live on the device, for work that Python does not see: the replays of a captured CUDA graph.

Python runs once, when a graph is captured, and never when it is replayed. An addition to a tensor is captured with the
rest and runs with every replay: one a graph, of all that its layers count (`graph_tally.py`). What runs outside a graph
is counted on the host, for less than a launch costs. Nothing waits for the device: a thread reads the counters now and
then.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from helix_runtime.capture_id import current_capture
from helix_runtime.graph_tally import GRAPHS, GraphTallies


class DeviceCounters:
    """int64 counters by name: in one tensor on `device`, and beside it on the host.

    `together`: names that are bumped at once, by one kernel; their increments are made now, because nothing may be
    allocated while a graph is captured. `capture_id`: see `current_capture`, which is the default. Call `flush` after
    captures, before the first replay that shall count.
    """

    def __init__(
        self,
        device: torch.device | str,
        names: Sequence[str],
        together: Sequence[tuple[str, ...]] = (),
        capture_id: Callable[[], int | None] | None = None,
    ):
        self.names = tuple(names)
        self.values = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.step = torch.zeros_like(self.values)
        self.follows = False  # whether a graph adds `step`
        self._index = {name: index for index, name in enumerate(self.names)}
        self._on_host = {key: self._increment(key) for key in (*((name,) for name in self.names), *together)}
        self._eager = dict.fromkeys(self._on_host, 0)
        self._increments = {key: torch.from_numpy(value).to(device) for key, value in self._on_host.items()}
        if capture_id is None:
            capture_id = current_capture if self.values.is_cuda else _no_capture
        self._graphs = GraphTallies(device, len(self.names), capture_id, GRAPHS)

    def bump(self, *names: str) -> None:
        """Add 1 to each of `names`, which is one of `together` or one name: on the host, or, while a graph is captured,
        on the current stream, one addition for all calls."""
        capture = self._graphs.capture()
        if capture is None:
            return self.bump_eager(names)
        graph = self._graphs.of(capture)
        if graph is None:
            self.values.add_(self._increments[names])
            return
        if not graph.counts.any():
            self.values.add_(graph.device_counts)
        graph.counts[:] += self._on_host[names]

    def bump_eager(self, names: tuple[str, ...]) -> None:
        """`bump` by a caller that knows that nothing is being captured: well below a microsecond."""
        self._eager[names] += 1

    def bump_step(self) -> None:
        """Add what `set_step` last said: for a captured graph that is replayed for steps of several kinds.

        While a graph is captured, one addition for all calls.
        """
        self.follows = True
        capture = self._graphs.capture()
        graph = None if capture is None else self._graphs.of(capture)
        if graph is None:
            self.values.add_(self.step)
            return
        if not graph.steps.any():
            self.values.addcmul_(self.step, graph.device_steps)
        graph.steps[:] += 1

    def flush(self) -> None:
        """Let replays of the graphs captured so far count. Costs nothing where none is new; not during a capture."""
        self._graphs.flush()

    def set_step(self, which: torch.Tensor, yes: tuple[str, ...], no: tuple[str, ...]) -> None:
        """`bump_step` adds 1 to each of `yes` where `which` (one bool on the device) holds, else to each of `no`."""
        self.step.copy_(torch.where(which, self._increments[yes], self._increments[no]))

    def add(self, name: str, by: torch.Tensor | int) -> None:
        """Add a number, or a tensor of one integer on the same device, without waiting for it."""
        self.values[self._index[name]].add_(by)

    def reset(self) -> None:
        self.values.zero_()
        self._eager = dict.fromkeys(self._eager, 0)

    def read(self) -> list[int]:
        """The values now. Waits for a copy, not for the device's current stream: work that is queued may be missing."""
        cuda = self.values.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.values.device)) if cuda else nullcontext():
            on_device = self.values.cpu().numpy()
        eager = (times * self._on_host[names] for names, times in self._eager.items() if times)
        return sum(eager, start=on_device).tolist()

    def _increment(self, names: tuple[str, ...]) -> np.ndarray:
        return np.array([int(name in names) for name in self.names], dtype=np.int64)


def _no_capture() -> None:
    """There are no captures on a CPU."""


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

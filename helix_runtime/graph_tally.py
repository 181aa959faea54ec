"""What one replay of each captured CUDA graph adds to counters: tallied on the host while the graph is captured.

A graph adds its row of a tensor, once, whatever the number of its layers. While it is captured the row is not known
yet, nor can it be copied; `flush` does that afterwards, before the first replay that shall count.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from helix_runtime.capture_id import UNTOLD

log = logging.getLogger(__name__)

#: Captures that can be tallied. vLLM captures some two a batch size; captures without attention take no row.
GRAPHS = 1024


@dataclass(frozen=True)
class Tally:
    """One capture. counts, steps: int64 [names] and [1] on the host; device_counts, device_steps: their place there."""

    counts: np.ndarray
    steps: np.ndarray
    device_counts: torch.Tensor
    device_steps: torch.Tensor


class GraphTallies:
    """Rows for `graphs` captures of `width` counters, allocated now: a capture allows no allocation.

    capture_id: the number of the capture that the current stream is part of, or None; UNTOLD where it has none.
    """

    def __init__(self, device: torch.device | str, width: int, capture_id: Callable[[], int | None], graphs: int):
        self._host = np.zeros((graphs, width + 1), dtype=np.int64)
        self._device = torch.zeros(graphs, width + 1, dtype=torch.int64, device=device)
        self._capture_id = capture_id
        self._tallies: dict[int, Tally | None] = {}
        self._dirty = False

    def capture(self) -> int | None:
        """The capture that goes on; None where there is none."""
        return self._capture_id()

    def of(self, capture: int) -> Tally | None:
        """The tally of a capture that goes on, to be added to; None: add on the device, every time.

        None where captures cannot be told apart, and where no row is left.
        """
        if capture == UNTOLD:
            return None
        if capture not in self._tallies:
            self._tallies[capture] = self._next()
        tally = self._tallies[capture]
        self._dirty |= tally is not None
        return tally

    def flush(self) -> None:
        """Copy the tallies to the device, if there are new ones and nothing is being captured."""
        if self._dirty and self._capture_id() is None:
            self._device.copy_(torch.from_numpy(self._host))
            self._dirty = False

    def _next(self) -> Tally | None:
        row = len(self._tallies)
        if row >= len(self._host):
            if row == len(self._host):
                log.warning("more than %d CUDA graphs were captured: the proof adds once a layer in the rest", row)
            return None
        host, device = self._host[row], self._device[row]
        return Tally(host[:-1], host[-1:], device[:-1], device[-1:])

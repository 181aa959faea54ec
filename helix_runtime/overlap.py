"""HOP-B: the exchange of one micro-batch under the attention of the next.

A decode batch is cut into micro-batches of requests. As soon as the attention of one is done, its exchange runs beside
the attention of the next, so that only the last exchange is exposed. Either each micro-batch is an attention of its own
(`overlapped`), or one attention of the whole batch says which rows are done (`overlapped_once`). Requests do not see
each other in decode attention, so the result is the same numbers; it is the same bits where attention's own numerics do
not depend on the batch around a row.

Source: Helix paper (arXiv 2507.07120), section 2.1.3.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import torch

Partial = TypeVar("Partial")
Rows = TypeVar("Rows")


def micro_batches(requests: int, count: int, halvings: int = 0) -> list[slice]:
    """`count` consecutive slices of `requests`, as equal as may be; fewer where there are too few requests.

    halvings: the last slices are each about half of the one before. What stays exposed is the exchange of the last
    slice, and an exchange that takes at most half of its attention's time still fits under a slice half its own size.
    """
    count = max(1, min(count, requests))
    weights = [2.0 ** -max(0, halvings - left) for left in reversed(range(count))]
    total = sum(weights)
    edges = [0, *(round(requests * sum(weights[: part + 1]) / total) for part in range(count))]
    slices = [slice(low, high) for low, high in itertools.pairwise(edges) if high > low]
    return slices or [slice(0, requests)]


class Lanes(Protocol):
    """Where exchanges run, in order, beside what the caller does next."""

    def mark(self) -> object:
        """This point in what the caller issues, for `submit`."""
        ...

    def submit(self, exchange: Callable[[], None], after: object = None) -> object:
        """Start `exchange` once everything the caller has issued so far is done; or until `after`, a mark. Returns a
        mark of its end, for another lane."""
        ...

    def join(self) -> None:
        """What the caller issues from here on comes after every exchange."""
        ...


class StreamLanes:
    """A second CUDA stream. Can be captured in a CUDA graph: it forks from the current stream and joins it again.

    Its priority is higher, so that an exchange gets the next multiprocessor that attention leaves, not the last.
    """

    def __init__(self, device: torch.device | str):
        self.stream = torch.cuda.Stream(device, priority=-1)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.stream.device).record_event()

    def submit(self, exchange: Callable[[], None], after: torch.cuda.Event | None = None) -> torch.cuda.Event:
        self.stream.wait_event(after or self.mark())
        with torch.cuda.stream(self.stream):
            exchange()
            return self.stream.record_event()

    def join(self) -> None:
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class ThreadLanes:
    """One thread, for CPU: a collective waits in it for its peers while the caller computes. Order is kept, and so is
    the caller's inference mode, which a thread does not inherit."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="helix-exchange")
        self._pending: list[Future] = []

    def mark(self) -> None:
        """Nothing: the caller's work is done when it returns."""

    def submit(self, exchange: Callable[[], None], after: Future | None = None) -> Future:
        inference = torch.is_inference_mode_enabled()

        def run():
            if after is not None:
                after.result()
            with torch.inference_mode(inference):
                exchange()

        self._pending.append(self._thread.submit(run))
        return self._pending[-1]

    def join(self) -> None:
        """Raises what an exchange raised."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


@cache
def lanes_of(device: torch.device) -> Lanes:
    """This process's lanes for work on `device`: made once."""
    return StreamLanes(device) if device.type == "cuda" else ThreadLanes()


def overlapped(
    slices: Sequence[slice],
    attend: Callable[[int, slice], Partial],
    exchange: Callable[[int, slice, Partial], None],
    lanes: Lanes,
) -> None:
    """Attend every slice in order, each one's exchange beside the attention of the next.

    attend(index, slice) returns a partial; exchange(index, slice, partial) moves and merges it, and writes the result
    where it belongs. Exchanges run one at a time and in order, so they agree on every rank. One slice runs as if
    nothing overlapped. Memory of the partials is held until all exchanges are joined.
    """
    if len(slices) == 1:
        return exchange(0, slices[0], attend(0, slices[0]))
    held = []
    for index, part in enumerate(slices):
        partial = attend(index, part)
        held.append(partial)  # allocated on the caller's stream, read on the other: not to be reused before the join
        lanes.submit(lambda index=index, part=part, partial=partial: exchange(index, part, partial))
    lanes.join()
    return None


def overlapped_once(
    slices: Sequence[slice],
    attend: Callable[[], Partial],
    arrive: Callable[[int, slice, Partial], Rows],
    exchange: Callable[[int, slice, Rows], None],
    lanes: Lanes,
    arrivals: Lanes,
) -> None:
    """Attend the whole batch in one launch, the exchange of each slice as soon as its rows are done.

    attend() starts the attention and returns its partial; arrive(index, slice, partial) waits for the rows of its slice
    (`attention.completion`) and returns them ready to be sent; exchange(index, slice, rows) moves and merges them.
    `arrivals` is a lane of its own, so that an exchange never waits for the rows of the next slice to be made ready.
    Exchanges run one at a time and in order, so they agree on every rank. One slice runs as if nothing overlapped. The
    memory of the partial and the rows is held until all are joined. Where an attend only returns when it is done, as on
    CPU, nothing is hidden.
    """
    if len(slices) == 1:
        return exchange(0, slices[0], arrive(0, slices[0], attend()))
    # The other lanes start where the caller stands now, not behind the attention. The attention is still issued first:
    # were streams to share a hardware queue, a wait ahead of it would keep it from ever starting.
    before = lanes.mark()
    partial = attend()
    rows: dict[int, Rows] = {}
    for index, part in enumerate(slices):

        def arriving(index=index, part=part):
            rows[index] = arrive(index, part, partial)

        ready = arrivals.submit(arriving, before)
        lanes.submit(lambda index=index, part=part: exchange(index, part, rows[index]), ready)
    try:
        arrivals.join()
    finally:
        lanes.join()
    return None


@dataclass(frozen=True)
class Way:
    """How a batch is overlapped: in `count` micro-batches, the last ones halved `halvings` times; `once`: one attention
    says which rows are done (`overlapped_once`), else each micro-batch is an attention of its own."""

    count: int = 1
    halvings: int = 0
    once: bool = False

    def slices(self, requests: int) -> list[slice]:
        return micro_batches(requests, self.count, self.halvings)


#: What the rule chooses from, beside no overlap.
WAYS = (Way(2), Way(5), Way(8), Way(8, 0, True), Way(8, 3, True), Way(16, 3, True), Way(24, 3, True))


@dataclass(frozen=True)
class OverlapCosts:
    """What overlap costs. Fitted by `python -m benchmarks.overlap_fit`: of all costs on a coarse grid, those whose
    choices are at most 1 % slower than no overlap at every size measured, and save most in sum.

    split: microseconds that an attention of its own adds to its part of the whole's time. start: the same for an
    exchange. contention: share of the exchange's time by which attention beside it is slowed. slower: share of its time
    by which one attention that says which rows are done is slower than the fastest; late: share of its time by which it
    says so late.
    """

    split: float = 16.0
    start: float = 8.0
    contention: float = 0.4
    slower: float = 0.01
    late: float = 0.2


def predicted_us(
    way: Way, requests: int, attention_us: float, exchange_us: float, costs: OverlapCosts = OverlapCosts()
) -> float:
    """Time of attention and exchange that way; of one micro-batch, their sum."""
    slices = way.slices(requests)
    if len(slices) == 1:
        return attention_us + exchange_us
    whole = attention_us * (1 + costs.slower * way.once) + costs.contention * exchange_us
    ended = 0.0
    for number, part in enumerate(slices, 1):
        done = whole * part.stop / requests
        done = min(whole, done + costs.late * attention_us) if way.once else done + costs.split * number
        ended = max(ended, done) + costs.start + exchange_us * (part.stop - part.start) / requests
    return ended


def best_way(
    requests: int,
    attention_us: float,
    exchange_us: float,
    costs: OverlapCosts = OverlapCosts(),
    ways: Sequence[Way] = WAYS,
    gain: float = 0.02,
) -> Way:
    """How to overlap a batch of `requests`: the predicted best of `ways`, or `Way()` where it would not save `gain`.

    attention_us, exchange_us: of the whole batch, alone on the device.
    """
    times = {
        way: predicted_us(way, requests, attention_us, exchange_us, costs) for way in ways if 1 < way.count <= requests
    }
    best = min(times, key=times.__getitem__, default=None)
    return best if best and times[best] <= (1 - gain) * (attention_us + exchange_us) else Way()


def measured_count(times_us: dict[int, float], gain: float = 0.02) -> int:
    """The number of micro-batches whose measured time is least, or 1 where it does not save `gain` of that of 1."""
    best = min(times_us, key=lambda count: times_us[count])
    return best if times_us[best] <= (1 - gain) * times_us[1] else 1

"""Every way to run every legal layout, costed at once: a plan's rows, and the sweep over batches behind its gains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helix_runtime.layout import Layout
from helix_runtime.planner.calibration import Calibration, by_backend, repeated
from helix_runtime.planner.capacity import capacity
from helix_runtime.planner.cost import TERMS, Cost, Workload, cached_bytes, decode, eager, prefill, stored_bytes
from helix_runtime.planner.grid import A2A, AG_RS, MERGES, Grid, entry
from helix_runtime.planner.measurements import Measurement
from helix_runtime.planner.row import Row, bound, command, refused
from helix_runtime.planner.verdict import WORTHWHILE

if TYPE_CHECKING:
    from helix_runtime.planner.plan import Question

#: Batches that are tried for `--ttl-ms`, for the front and for the gains: dense below 32, then 5 % apart.
BATCHES = tuple(sorted({*range(1, 33), *np.unique(np.geomspace(32, 65536, 157).astype(int)).tolist()}))


#: Contexts at which the crossover is looked for.
CONTEXTS = tuple(1024 * 2**power for power in range(12))


@dataclass(frozen=True)
class Sweep:
    """Latency of every sharding at every batch that fits, over all GPUs: `users` and `seconds` are [entries, BATCHES].

    `seconds` is infinite where the batch does not fit.
    """

    layouts: tuple[Layout, ...]
    users: np.ndarray
    seconds: np.ndarray


class Variant(NamedTuple):
    """One way to run a layout: MLA with or without replicated queries, stock DCP with either exchange."""

    layout: Layout
    replicate: bool
    merge: int

    @property
    def key(self) -> tuple[int, int, bool, str | None]:
        """What a row of the plan stands for: of its variants it shows the fastest."""
        return self.layout.tp, self.layout.kvp, self.layout.helix_mode, self.layout.attention_backend

    @property
    def comm(self) -> str | None:
        """vLLM's name of the exchange; None where nothing is exchanged."""
        return next(name for name, merge in MERGES.items() if merge == self.merge) if self.layout.kvp > 1 else None


def variants(layouts: Sequence[Layout]) -> list[Variant]:
    """Every variant, each layout's defaults first. Helix merges by All-to-All alone: it is what the paper proposes."""
    found = []
    for layout in layouts:
        shared = layout.kvp > 1
        for replicate in (False, True) if layout.use_mla and shared else (False,):
            merges = (AG_RS, A2A) if shared and not layout.helix_mode else (A2A,)
            found += [Variant(layout, replicate, merge) for merge in merges]
    return found


class Candidates:
    """Layouts with their backends in all their variants, costed at once."""

    def __init__(self, question: "Question", calibration: Calibration, measured: Sequence[Measurement] | None):
        self.question = question
        self.layouts = question.layouts()
        self.variants = variants(self.layouts)
        backends = [one.layout.attention_backend for one in self.variants]
        alike = measured is None
        self.calibration = calibration if alike else by_backend(calibration, question.gpu.key, backends, measured)
        workload, gpu = question.workload, question.gpu
        self.grid = Grid.of(entry(one.layout, one.replicate, merge=one.merge) for one in self.variants)
        self.stored = stored_bytes(workload, self.grid)
        self.cached = cached_bytes(workload, self.grid)
        self.capacities = [
            capacity(gpu, weights, cached, question.context, one.layout.kvp, question.block)
            for one, weights, cached in zip(self.variants, self.stored, self.cached, strict=True)
        ]
        self.servers = np.array([question.gpus // one.layout.tp for one in self.variants])
        self.fits = np.array([one.users for one in self.capacities])

    @cached_property
    def sweep(self) -> Sweep:
        grid = self.grid.times(BATCHES)
        cost = decode(self.question.workload, self.question.gpu, repeated(self.calibration, len(BATCHES)), grid)
        seconds = cost.total.reshape(len(self.grid), len(BATCHES))
        batches = np.array(BATCHES)
        seconds = np.where(batches[None, :] <= self.fits[:, None], seconds, np.inf)
        layouts = tuple(one.layout for one in self.variants)
        return Sweep(layouts, self.servers[:, None] * batches[None, :], seconds)

    def crossover(self) -> int | None:
        """The shortest of CONTEXTS from which the best Helix layout stays faster than the best standard TP."""
        question = self.question
        batch = np.maximum(1, np.ceil(question.users / self.servers).astype(int))
        grid = Grid(**{**self.grid.__dict__, "batch": batch})
        helix = np.array([one.layout.helix_mode for one in self.variants])
        plain = np.array([one.layout.kvp == 1 for one in self.variants])
        found = None
        for context in reversed(CONTEXTS):
            workload = Workload(question.shape, context, question.weights, question.kv)
            seconds = decode(workload, question.gpu, self.calibration, grid).total
            if not seconds[helix].min() * WORTHWHILE < seconds[plain].min():
                break
            found = context
        return found

    def batches(self) -> np.ndarray:
        """Batch of one server: the asked users spread over the servers, or as many as keep the latency."""
        if self.question.ttl_ms is None:
            return np.maximum(1, np.ceil(self.question.users / self.servers).astype(int))
        keeps = self.sweep.seconds <= self.question.ttl_ms * 1e-3
        most = np.where(keeps, np.array(BATCHES)[None, :], 0).max(axis=1)
        return np.maximum(1, most)

    def rows(self) -> tuple[Row, ...]:
        question, gpu = self.question, self.question.gpu
        batches = self.batches()
        grid = Grid(**{**self.grid.__dict__, "batch": batches})
        cost = decode(question.workload, gpu, self.calibration, grid)
        total, (low, high) = cost.total, cost.band(self.calibration)
        prompt = prefill(question.workload, gpu, self.calibration, self.grid)
        best = self._fastest(total, batches)
        plain = self._plain(prompt)
        kept = self._kept(total, batches)
        users = (
            np.minimum(batches * self.servers, question.users) if question.ttl_ms is None else batches * self.servers
        )
        speed = users / total / question.gpus
        front = _front(1 / total, speed, kept & np.isin(np.arange(len(total)), list(best.values())))
        made = [self._row(at, cost) for at in best.values()]
        rows = [
            row.model_copy(
                update={
                    "batch": int(batches[at]),
                    "users": int(users[at]),
                    "possible": bool(kept[at]),
                    "latency_ms": total[at] * 1e3,
                    "latency_low_ms": low[at] * 1e3,
                    "latency_high_ms": high[at] * 1e3,
                    "prefill_s": float(prompt[at]),
                    "prefill_factor": _against(prompt[at], plain, row),
                    "tokens_per_second_user": float(1 / total[at]),
                    "tokens_per_second_gpu": float(speed[at]) if kept[at] else 0.0,
                    "pareto": bool(front[at]),
                }
            )
            for row, at in made
        ]
        order = (lambda row: -row.users) if question.ttl_ms is not None else (lambda row: row.latency_ms)
        return tuple(
            sorted(rows, key=lambda row: (not row.possible, order(row), row.latency_ms, row.refused_today is not None))
        )

    def _fastest(self, total: np.ndarray, batches: np.ndarray) -> dict[tuple, int]:
        """The variant of each row: with the most users where a latency is kept, else the fastest; of equals the first,
        which is the default."""
        best: dict[tuple, int] = {}
        for at, one in enumerate(self.variants):
            rank = (-batches[at], total[at])
            if one.key not in best or rank < (-batches[best[one.key]], total[best[one.key]]):
                best[one.key] = at
        return best

    def _plain(self, prompt: np.ndarray) -> dict[tuple, float]:
        """Seconds of standard TP's prompt pass by (TP, backend), and by TP alone for those that serve only shared
        caches: there the fastest."""
        found: dict[tuple, float] = {}
        for at, (layout, *_) in enumerate(self.variants):
            if layout.kvp == 1:
                found[layout.tp, layout.attention_backend] = prompt[at]
                found[layout.tp, None] = min(prompt[at], found.get((layout.tp, None), math.inf))
        return found

    def _kept(self, total: np.ndarray, batches: np.ndarray) -> np.ndarray:
        fits = batches <= self.fits
        return fits if self.question.ttl_ms is None else fits & (total <= self.question.ttl_ms * 1e-3)

    def _row(self, at: int, cost: Cost) -> tuple[Row, int]:
        question, room, one = self.question, self.capacities[at], self.variants[at]
        layout = one.layout
        terms = {term: float(cost.terms[term][at] * 1e3) for term in TERMS}
        no = refused(layout, question)
        row = Row(
            tp=layout.tp,
            kvp=layout.kvp,
            tpa=layout.tpa,
            mode=layout.mode,
            backend=layout.attention_backend,
            comm=one.comm,
            servers=int(self.servers[at]),
            duplication=layout.duplication,
            capacity_factor=layout.kv_capacity_factor,
            kv_bytes_per_token_gpu=float(self.cached[at] / layout.kvp),
            kv_bytes_per_user_gpu=room.per_user,
            kv_pool_bytes_gpu=room.pool,
            weight_bytes_gpu=float(self.stored[at]),
            users_that_fit=room.users * int(self.servers[at]),
            tokens_that_fit=room.tokens * int(self.servers[at]),
            pool_wasted=room.wasted,
            block_rounding=room.rounding,
            granularity_tokens=room.granularity,
            prefix_lost_tokens=room.prefix_lost,
            one_more_user_at=room.more_at,
            one_fewer_user_from=room.fewer_at,
            terms_ms=terms,
            reads_ms=float(cost.reads[at] * 1e3),
            bound_by=bound(terms, bool(cost.attention_computes[at]), bool(cost.weights_compute[at])),
            eager_ms=eager(question.shape, self.calibration) * 1e3,
            refused_today=no,
            notes=layout.notes,
            command=command(layout, question, one.replicate, one.comm),
        )
        return row, at


def _against(seconds: float, plain: dict[tuple, float], row: Row) -> float | None:
    """`seconds` over those of standard TP of the same size with the same backend, or with the fastest where it has
    none."""
    standard = plain.get((row.tp, row.backend), plain.get((row.tp, None)))
    return None if standard is None else float(seconds / standard)


def _front(speed: np.ndarray, throughput: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Which entries no other one beats in both tokens/s a user and tokens/s a GPU."""
    marks = np.zeros(len(speed), bool)
    for at in np.flatnonzero(possible):
        better = possible & (speed >= speed[at]) & (throughput >= throughput[at])
        better &= (speed > speed[at]) | (throughput > throughput[at])
        marks[at] = not better.any()
    return marks

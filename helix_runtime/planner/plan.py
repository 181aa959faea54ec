"""One question, every legal layout, one answer. The rules are `helix_runtime.layout`'s; nothing is refused here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from helix_runtime import capabilities
from helix_runtime.layout import Layout, LayoutError, legal_layouts
from helix_runtime.planner.calibration import FOLDER, Calibration, Fit, by_backend, calibrate, repeated
from helix_runtime.planner.capacity import capacity
from helix_runtime.planner.cost import TERMS, Cost, Workload, cached_bytes, decode, eager, prefill, stored_bytes
from helix_runtime.planner.grid import A2A, AG_RS, MERGES, Grid, entry
from helix_runtime.planner.hardware import BYTES, Gpu, PlannerError
from helix_runtime.planner.measurements import Measurement, read_measurements
from helix_runtime.planner.row import Row, bound, command, refused
from helix_runtime.planner.verdict import WORTHWHILE, Verdict, judge
from helix_runtime.shapes import ModelShape

DEFAULT_BATCH = 8
DEFAULT_BLOCK = 16
#: Batches that are tried for `--ttl-ms`, for the front and for the gains: dense below 32, then 5 % apart.
BATCHES = tuple(sorted({*range(1, 33), *np.unique(np.geomspace(32, 65536, 157).astype(int)).tolist()}))


#: Contexts at which the crossover is looked for.
CONTEXTS = tuple(1024 * 2**power for power in range(12))


@dataclass(frozen=True, kw_only=True)
class Question:
    """`batch`: users over all GPUs; or `ttl_ms`: the latency that must be kept. `backend`: only this one."""

    shape: ModelShape
    gpu: Gpu
    gpus: int
    context: int
    batch: int | None = None
    ttl_ms: float | None = None
    weights: str = "bf16"
    kv: str = "bf16"
    block: int = DEFAULT_BLOCK
    backend: str | None = None
    allow_gqa_tpa1: bool = False

    @property
    def users(self) -> int:
        return self.batch or DEFAULT_BATCH

    @property
    def workload(self) -> Workload:
        return Workload(self.shape, self.context, self.weights, self.kv)

    def layouts(self) -> list[Layout]:
        """Every legal layout with every backend that serves it here. PlannerError where there is none."""
        return [layout for layout in self._sizes() if layout.attention_backend]

    def _sizes(self) -> list[Layout]:
        names = capabilities.backends(self.gpu.family, mla=self.shape.use_mla)
        if self.backend is not None and self.backend not in names:
            kind = "MLA" if self.shape.use_mla else "GQA"
            raise PlannerError(
                f"{self.backend!r} serves no {kind} model on {self.gpu.family}; allowed with --backend: "
                f"{', '.join(names)}"
            )
        found: list[Layout] = []
        for name in (self.backend,) if self.backend else names:
            try:
                found += legal_layouts(
                    gpus=self.gpus,
                    **self.shape.layout_arguments(),
                    hardware=self.gpu.family,
                    attention_backend=name,
                    block_size=self.block,
                    kv_dtype_bytes=BYTES[self.kv],
                    allow_gqa_tpa1=self.allow_gqa_tpa1,
                )
            except LayoutError as error:
                raise PlannerError(f"{self.shape.name}: {error.sentence} [rule {error.rule}]") from None
        if not found:
            raise PlannerError(
                f"no layout of {self.shape.name} is legal on {self.gpus} {self.gpu.key}; allow more --gpus"
            )
        order = {mode: number for number, mode in enumerate(capabilities.MODES)}
        return sorted(found, key=lambda layout: (layout.tp, layout.kvp, order[layout.mode]))


@dataclass(frozen=True)
class Plan:
    """`rows`: every legal layout with every backend, the best first. `best` is None where nothing fits.

    `attention`: the fit of each backend, where they are not priced alike.
    """

    question: Question
    rows: tuple[Row, ...]
    verdict: Verdict
    calibration: Calibration
    attention: tuple[tuple[str, Fit], ...] = ()

    @property
    def fits(self) -> dict[str, Fit]:
        """What prices the rows, by class, and attention by backend; without the attention of other models."""
        mla = self.question.shape.use_mla
        own, other = ("latent attention", "attention")[:: 1 if mla else -1]
        found = {kind: fit for kind, fit in self.calibration.fits.items() if kind != other}
        if self.attention:
            del found[own]
        return {f"{own} with {name}": fit for name, fit in self.attention} | found

    @property
    def best(self) -> Row | None:
        return self.verdict.best

    @property
    def starts_today(self) -> Row | None:
        """The best row that neither the plugin nor vLLM refuses so far."""
        return next((row for row in self.rows if row.possible and not row.refused_today), None)

    @property
    def front(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.pareto)


def plan(question: Question, calibration: Calibration | None = None) -> Plan:
    """Answer `question`, each backend as it was measured. `calibration` instead prices all backends alike.

    PlannerError where it has no answer.
    """
    found = read_measurements(FOLDER) if calibration is None else None
    if found is not None:
        calibration = calibrate(question.gpu.key, question.backend, given=found.measurements)
        calibration = replace(calibration, left_out=found.left_out)
    candidates = _Candidates(question, calibration, found.measurements if found else None)
    rows = candidates.rows()
    verdict = judge(question, rows, candidates.sweep, candidates.crossover)
    attention: tuple[tuple[str, Fit], ...] = ()
    if found is not None:
        kind = "latent attention" if question.shape.use_mla else "attention"
        names = sorted({row.backend for row in rows})
        attention = tuple((name, calibrate(question.gpu.key, name, given=found.measurements)[kind]) for name in names)
    return Plan(question, rows, verdict, calibration, attention)


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


class _Candidates:
    """Layouts with their backends in all their variants, costed at once."""

    def __init__(self, question: Question, calibration: Calibration, measured: Sequence[Measurement] | None):
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


def layouts_of(rows: Sequence[Row]) -> set[tuple[int, int, str, str]]:
    """(TP, DCP, mode, backend) of every row."""
    return {(row.tp, row.kvp, row.mode, row.backend) for row in rows}

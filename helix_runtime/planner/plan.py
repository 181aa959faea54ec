"""One question, every legal layout, one answer. The rules are `helix_runtime.layout`'s; nothing is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from helix_runtime import capabilities
from helix_runtime.layout import Layout, LayoutError, legal_layouts
from helix_runtime.planner.calibration import FOLDER, Calibration, Fit, calibrate
from helix_runtime.planner.candidates import Candidates
from helix_runtime.planner.cost import Workload
from helix_runtime.planner.hardware import BYTES, Gpu, PlannerError
from helix_runtime.planner.measurements import read_measurements
from helix_runtime.planner.row import Row
from helix_runtime.planner.verdict import Verdict, judge
from helix_runtime.shapes import ModelShape

DEFAULT_BATCH = 8
DEFAULT_BLOCK = 16


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
    candidates = Candidates(question, calibration, found.measurements if found else None)
    rows = candidates.rows()
    verdict = judge(question, rows, candidates.sweep, candidates.crossover)
    attention: tuple[tuple[str, Fit], ...] = ()
    if found is not None:
        kind = "latent attention" if question.shape.use_mla else "attention"
        names = sorted({row.backend for row in rows})
        attention = tuple((name, calibrate(question.gpu.key, name, given=found.measurements)[kind]) for name in names)
    return Plan(question, rows, verdict, calibration, attention)


def layouts_of(rows: Sequence[Row]) -> set[tuple[int, int, str, str]]:
    """(TP, DCP, mode, backend) of every row."""
    return {(row.tp, row.kvp, row.mode, row.backend) for row in rows}

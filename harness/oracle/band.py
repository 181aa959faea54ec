"""The null band: how far two right servers of one model differ by rounding alone. A plain value, saved with the run.

It is measured (`harness.oracle.calibrate`), never chosen: standard TP against itself with its reductions in another
order. Where a run measured too little, the band that was measured for that dtype and kind of model is used instead
(`shipped`).
"""

import math
from pathlib import Path
from typing import Literal

from harness.frozen import Frozen
from harness.models.recipe import PREFIX
from harness.oracle.statistics import Tail

SCHEMA = 1
SHIPPED = Path(__file__).parent / "null"

#: How much louder a model may be than those that a shipped band was measured with: another depth, another contrast of
#: its logits. A choice, not a measurement; it matters only where a run cannot measure a band of its own, and where a
#: TPn baseline is compared with TP1 before it may serve as one.
TRANSFER = 4.0

#: How often a run of clean cells may raise any alarm at all.
RUN_RATE = 0.01


class Source(Frozen):
    """One pair of standard-TP transcripts that the band was measured from.

    `kind`: what differed: `tp size`, `batch composition`, `again`. `identical`: share of steps without any change; a
    pair in which most steps are identical says that nothing was reordered and is listed, not used. `median`: of the
    decode steps that changed, in nats. `why`: why it is not used, where it is not for being identical.
    """

    kind: str
    baseline: str
    candidate: str
    prompts: int
    steps: int
    identical: float
    used: bool
    median: float = 0.0
    why: str = ""


class Row(Frozen):
    """The null's loudness on some steps: mean log change of one prompt within one bin of positions, over `n` steps."""

    prompt: str
    bin: int
    mean: float
    n: int


class Curve(Frozen):
    """The null's KL in one bin of positions, in nats: mean and largest over `n` steps."""

    bin: int
    kl: float
    worst: float
    n: int


class PhaseBand(Frozen):
    """The null of prefill's token or of decode.

    `change`: tail of the largest |Δ logprob| of a step, nats. `distance`: tail of sqrt(2 KL), which is a change in
    nats as well. `level`: mean log change; `sd`: its standard deviation among steps of one row, `between`: among the
    means of rows; `kl`, `forced`, `agreement`: means of KL, of |Δ logprob| of the imposed token, of keeping the best
    token. `n`: steps.
    """

    change: Tail
    distance: Tail
    level: float
    sd: float
    between: float = 0.0
    kl: float
    forced: float
    agreement: float
    n: int
    rows: tuple[Row, ...] = ()
    curve: tuple[Curve, ...] = ()

    def louder(self, factor: float) -> "PhaseBand":
        """The same null, every change `factor` times as large."""
        return self.model_copy(
            update={
                "change": self.change.scaled(factor),
                "distance": self.distance.scaled(factor),
                "level": self.level + math.log(factor),
                "kl": self.kl * factor**2,
                "forced": self.forced * factor,
            }
        )


class Spread(Frozen):
    """How much the loudness of right servers varies as a whole: standard deviations of log ratios between clean pairs.

    `cell`: of a whole cell; `group`: of a prompt class, position bin or batch place. `degrees`: of freedom they were
    measured with; `source`: the command that measured them.
    """

    cell: float
    group: float
    degrees: int
    source: str


class Shapes(Frozen):
    """Shapes of the tails of `PhaseBand.change` and `.distance`, two standard errors on the heavy side."""

    change: float
    distance: float


EXPONENTIAL = Shapes(change=0.0, distance=0.0)

#: Of models and dtypes for which none was measured: twice what was measured on CPU in fp32.
UNMEASURED = Spread(cell=0.2, group=0.2, degrees=20, source="not measured")


class Band(Frozen):
    """The null band of one model and dtype, at one TP size or (shipped) at any.

    `floor`: for levels, smaller changes of a step count as this, in nats.
    """

    schema_version: Literal[1] = SCHEMA
    name: str
    dtype: str
    model: str
    workload_key: str
    sources: tuple[Source, ...]
    floor: float
    prefill: PhaseBand
    decode: PhaseBand
    spread: Spread

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Band":
        """Raises OSError, or ValueError (pydantic's) when the file is no band."""
        return cls.model_validate_json(path.read_text())

    @property
    def shapes(self) -> Shapes:
        return Shapes(change=self.decode.change.shape, distance=self.decode.distance.shape)

    def phase(self, prefill: bool) -> PhaseBand:
        return self.prefill if prefill else self.decode


def kind_of(model: str) -> str:
    """Models of one kind share a shipped band: `made` (random weights), `retrieve` (made to look things up), `hub`."""
    if not model.startswith(PREFIX):
        return "hub"
    return "retrieve" if "-retrieve" in model else "made"


def shipped(dtype: str, model: str) -> Band:
    """The band in the repository for `dtype` and the kind of `model`; a KeyError that names what there is otherwise.

    For a model that it was not measured with it is `TRANSFER` times as wide, and says so.
    """
    path = SHIPPED / f"{dtype}-{kind_of(model)}.json"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json"))) or "none"
        raise KeyError(f"no null band for {dtype} and models of kind {kind_of(model)}; shipped: {names}")
    band = Band.load(path)
    if _names(band, model):
        return band
    return band.model_copy(
        update={
            "name": f"{band.name}, {TRANSFER:g} times as wide for another model",
            "prefill": band.prefill.louder(TRANSFER),
            "decode": band.decode.louder(TRANSFER),
        }
    )


def measured_with(dtype: str, model: str) -> bool:
    """Whether the shipped band of `dtype` was measured with `model`: what is judged of it is then not out of sample."""
    path = SHIPPED / f"{dtype}-{kind_of(model)}.json"
    return path.is_file() and _names(Band.load(path), model)


def _names(band: Band, model: str) -> bool:
    return any(f"/{model.removeprefix(PREFIX)}/" in source.baseline for source in band.sources)


def measured_elsewhere(dtype: str, model: str) -> tuple[Spread, Shapes]:
    """What a run cannot measure: from the shipped band of `dtype` and the kind of `model`, else cautious values."""
    try:
        band = shipped(dtype, model)
    except KeyError:
        return UNMEASURED, EXPONENTIAL
    return band.spread, band.shapes

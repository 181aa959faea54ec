"""The null band: how far two right servers of one model differ by rounding alone. A plain value, saved with the run.

It is measured (`harness.oracle.calibrate`), never chosen: standard TP against itself with its reductions in another
order. Where a run measured too little, the band that was measured for that dtype and kind of model is used instead
(`shipped`).
"""

from pathlib import Path
from typing import Literal

from harness.frozen import Frozen
from harness.models.recipe import PREFIX
from harness.oracle.statistics import Tail

SCHEMA = 1
SHIPPED = Path(__file__).parent / "null"

#: How often a run of clean cells may raise any alarm at all.
RUN_RATE = 0.01


class Source(Frozen):
    """One pair of standard-TP transcripts that the band was measured from.

    `kind`: what differed: `tp size`, `batch composition`, `again`. `identical`: share of steps without any change; a
    pair in which most steps are identical says that nothing was reordered and is listed, not used.
    """

    kind: str
    baseline: str
    candidate: str
    prompts: int
    steps: int
    identical: float
    used: bool


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
    nats as well. `level`: mean log change; `sd`: its standard deviation among steps of one row; `kl`, `forced`,
    `agreement`: means of KL, of |Δ logprob| of the imposed token, of keeping the best token. `n`: steps.
    """

    change: Tail
    distance: Tail
    level: float
    sd: float
    kl: float
    forced: float
    agreement: float
    n: int
    rows: tuple[Row, ...] = ()
    curve: tuple[Curve, ...] = ()


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
    """The band in the repository for `dtype` and the kind of `model`; a KeyError that names what there is otherwise."""
    path = SHIPPED / f"{dtype}-{kind_of(model)}.json"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json"))) or "none"
        raise KeyError(f"no null band for {dtype} and models of kind {kind_of(model)}; shipped: {names}")
    return Band.load(path)


def measured_elsewhere(dtype: str, model: str) -> tuple[Spread, Shapes]:
    """What a run cannot measure: from the shipped band of `dtype` and the kind of `model`, else cautious values."""
    try:
        band = shipped(dtype, model)
    except KeyError:
        return UNMEASURED, EXPONENTIAL
    return band.spread, band.shapes

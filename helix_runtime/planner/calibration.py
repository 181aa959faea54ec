"""How far the real kernels stay behind the data sheet: fitted to measurements, with a band from leaving cases out.

A kernel takes `overhead + per_rank * ranks + roofline / efficiency`, an All-to-All `large` more where its messages are
(`hardware.LL_BYTES`), fitted by least squares of relative errors, none of them negative. Of a collective's fit the
planner takes the efficiency; what it waits is in `hardware.json`. The band is the 90th percentile of
|log(predicted / measured)| when every measurement in turn is predicted by a fit to the other cases: one case, such as a
batch at a context, is measured in several files and by several kernels, and its own repetition would foretell it too
well. What nobody has measured is an assumption, says so, and has a wide band.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from helix_runtime import capabilities
from helix_runtime.planner.measurements import Measurement, read_measurements

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

#: Seconds of one kernel, or of many.
Seconds = TypeVar("Seconds", float, np.ndarray)

#: Seconds of attention at which backends are compared.
_TYPICAL = 1e-4
#: Fewer measurements than this do not make a fit.
ENOUGH = 4
#: Band of an assumption, and what is added where a fit is carried over to another GPU or backend: logs of a factor.
ASSUMED_BAND, CARRIED_BAND = math.log(1.35), math.log(1.15)
#: A fit never claims to be better than this.
SMALLEST_BAND = math.log(1.02)

#: Which series of a measurement is what a server runs; other classes take all. vLLM reduces a step's messages over a TP
#: group of one host by a kernel of its own, so that what NCCL's all-reduce takes says nothing of it.
_SERVED = {"pack": "vllm", "combine": "vllm", "all-reduce": "vllm"}


@dataclass(frozen=True)
class Fit:
    """Right within a factor of exp(±band) nine times out of ten. `overhead`, `per_rank`, `large`: seconds."""

    efficiency: float
    overhead: float = 0.0
    per_rank: float = 0.0
    band: float = ASSUMED_BAND
    n: int = 0
    source: str = "assumed"
    large: float = 0.0

    @property
    def measured(self) -> bool:
        return self.n > 0

    def predict(self, roofline: Seconds, ranks: Seconds = 1, large: bool = False) -> Seconds:
        """Seconds, from those that the data sheet would take."""
        return self.overhead + self.per_rank * ranks + roofline / self.efficiency + self.large * large


#: Where nothing was measured.
ASSUMED = {
    "stream": Fit(0.8),
    "attention": Fit(0.75),
    "latent attention": Fit(0.75),
    "weights": Fit(0.75),
    "pack": Fit(0.3, overhead=4e-6),
    "combine": Fit(0.4, overhead=2e-6),
    "launch": Fit(1.0, overhead=1e-6),
    "all-reduce": Fit(0.7),
    "all-to-all": Fit(0.7),
    "all-gather": Fit(0.7),
}
#: Fitted only where more than one number of ranks was measured: what two ranks take says nothing of 64.
_COLLECTIVES = ("all-reduce", "all-to-all", "all-gather")
#: Host time of one kernel that is launched outside a CUDA graph: assumed.
EAGER_LAUNCH = 5e-6


@dataclass(frozen=True)
class Calibration:
    """One fit a class. `left_out` are rows that could not be read."""

    fits: dict[str, Fit] = field(default_factory=lambda: dict(ASSUMED))
    left_out: tuple[str, ...] = ()

    def __getitem__(self, kind: str) -> Fit:
        return self.fits[kind]

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(kind for kind, fit in self.fits.items() if fit.measured)

    @property
    def assumed(self) -> tuple[str, ...]:
        return tuple(kind for kind, fit in self.fits.items() if not fit.measured)


#: The data sheet itself, for the paper's own equations: no overheads, nothing lost.
IDEAL = Calibration({kind: Fit(1.0, band=SMALLEST_BAND, source="data sheet") for kind in ASSUMED})


def fit(measurements: Sequence[Measurement]) -> Fit:
    """Least squares of relative errors over overhead, time a rank, roofline and what large messages wait, of those that
    come out positive."""
    columns = np.array([(1.0, one.ranks, one.roofline, one.large) for one in measurements])
    seconds = np.array([one.seconds for one in measurements])
    relative = columns / seconds[:, None]
    best, error = np.zeros(4), math.inf
    varied = [at for at in range(4) if at == 0 or np.ptp(columns[:, at]) > 0]
    for size in range(1, len(varied) + 1):
        for chosen in map(list, combinations(varied, size)):
            found, *_ = np.linalg.lstsq(relative[:, chosen], np.ones_like(seconds), rcond=None)
            missed = float(((relative[:, chosen] @ found - 1) ** 2).sum())
            if (found >= 0).all() and missed < error:
                best, error = np.zeros(4), missed
                best[chosen] = found
    overhead, per_rank, slope, large = (float(value) for value in best)
    efficiency = 1 / slope if slope > 0 else math.inf
    return Fit(efficiency, overhead=overhead, per_rank=per_rank, large=large, n=len(measurements))


def left_out_errors(measurements: Sequence[Measurement]) -> list[float]:
    """log(predicted / measured) of every measurement, predicted by a fit to all other cases.

    Where a class knows too few other cases for that, by a fit to all other measurements.
    """
    errors = []
    for at, one in enumerate(measurements):
        cases = [other for other in measurements if other.case != one.case]
        others = fit(cases if len(cases) >= ENOUGH - 1 else [*measurements[:at], *measurements[at + 1 :]])
        errors.append(math.log(max(others.predict(one.roofline, one.ranks, one.large), 1e-12) / one.seconds))
    return errors


def fitted(measurements: Sequence[Measurement]) -> Fit:
    """The fit of one class with its band. ValueError for fewer than ENOUGH measurements."""
    if len(measurements) < ENOUGH:
        raise ValueError(f"{len(measurements)} measurements; a fit needs {ENOUGH}")
    band = float(np.quantile(np.abs(left_out_errors(measurements)), 0.9, method="higher"))
    files = ", ".join(sorted({one.source for one in measurements}))
    return replace(fit(measurements), band=max(band, SMALLEST_BAND), source=files)


def calibrate(
    gpu: str, backend: str | None = None, folder: Path = FOLDER, given: Iterable[Measurement] | None = None
) -> Calibration:
    """The calibration for `gpu` (a key of `hardware.json`): fits where it, or another, was measured, else assumptions.

    `backend`: attention as measured with it, or with the middle one of the measured where it was not; None: all of them
    alike. `given` replaces what is read from `folder`.
    """
    found = read_measurements(folder) if given is None else None
    every = tuple(found.measurements if found else given)
    fits = {kind: _class(kind, gpu, backend, every) for kind in ASSUMED}
    return Calibration(_with_copies(fits), found.left_out if found else ())


def by_backend(whole: Calibration, gpu: str, backends: Sequence[str], given: Sequence[Measurement]) -> Calibration:
    """`whole` with attention fits that hold arrays, entry by entry that of `backends`."""
    fits = dict(whole.fits)
    for kind in ("attention", "latent attention"):
        known = {name: _with_copies({**fits, kind: _class(kind, gpu, name, given)})[kind] for name in set(backends)}
        each = [known[name] for name in backends]
        columns = {name: np.array([getattr(one, name) for one in each]) for name in ("efficiency", "overhead", "band")}
        fits[kind] = replace(fits[kind], per_rank=0.0, **columns)
    return Calibration(fits)


def repeated(calibration: Calibration, times: int) -> Calibration:
    """What `by_backend` made, for a grid whose every entry stands `times` times in a row."""

    def longer(one: Fit) -> Fit:
        columns = ("efficiency", "overhead", "band")
        arrays = {name: np.repeat(getattr(one, name), times) for name in columns if np.ndim(getattr(one, name))}
        return replace(one, **arrays)

    return Calibration({kind: longer(one) for kind, one in calibration.fits.items()})


def _class(kind: str, gpu: str, backend: str | None, every: Sequence[Measurement]) -> Fit:
    """The fit of one class, or its assumption."""
    own = [one for one in every if one.kind == kind and _SERVED.get(kind, one.series) == one.series]
    if kind == "stream":
        own = _fastest(own)
    elif kind.endswith("attention"):
        own = _attention(backend, own)
    here = [one for one in own if one.device == gpu]
    used = here if _enough(kind, here) else own
    if not _enough(kind, used):
        return ASSUMED[kind]
    found = fitted(used)
    elsewhere = [] if used is here else [", ".join(sorted({one.device for one in own}))]
    if backend is not None and kind.endswith("attention"):
        elsewhere += sorted({one.series for one in own} - {"", backend})
    if not elsewhere:
        return found
    source = f"{found.source}, carried over from {' and '.join(elsewhere)}"
    return replace(found, band=found.band + CARRIED_BAND * len(elsewhere), source=source)


def _enough(kind: str, measured: Sequence[Measurement]) -> bool:
    several = kind not in _COLLECTIVES or len({one.ranks for one in measured}) > 1
    return several and len(measured) >= ENOUGH


def _attention(backend: str | None, measured: Sequence[Measurement]) -> list[Measurement]:
    """What was measured with `backend`; without that, with the middle one of the measured (of two the slower); all of
    them where none is asked for. Kernels that are no backend of a server do not count."""
    served = [one for one in measured if one.series in ("", *capabilities.backends())]
    if backend is None:
        return served
    known = {name: [one for one in served if one.series == name] for name in {one.series for one in served}}
    known = {name: found for name, found in known.items() if len(found) >= ENOUGH}
    if backend in known or not known:
        return known.get(backend, served)
    ranked = sorted(known.values(), key=lambda found: fit(found).predict(_TYPICAL))
    return ranked[len(ranked) // 2]


def _with_copies(fits: dict[str, Fit]) -> dict[str, Fit]:
    """Without measurements of their own, attention and GEMMs stream memory as a copy does, at best."""
    if not fits["stream"].measured:
        return fits
    efficiency = fits["stream"].efficiency
    copied = Fit(efficiency, source=f"assumed as fast as a copy ({efficiency:.2f} of the data sheet)")
    kinds = ("attention", "latent attention", "weights")
    return {kind: copied if kind in kinds and not one.measured else one for kind, one in fits.items()}


def _fastest(copies: Sequence[Measurement]) -> list[Measurement]:
    """The fastest way to copy or to read, case by case: what the memory can do."""
    best: dict[tuple[str, str], Measurement] = {}
    for one in copies:
        key = (one.device, one.case)
        if key not in best or one.seconds < best[key].seconds:
            best[key] = one
    return list(best.values())

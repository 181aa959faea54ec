"""A null band with round bounds, for tests that are not about where bounds come from."""

import math

from harness.oracle.band import Band, PhaseBand, Spread
from harness.oracle.statistics import Tail


def made_band(change: float = 5e-4, distance: float = 5e-3, loudness: float = 1e9, dtype: str = "float32") -> Band:
    """Bounds are `change` (nats) and `distance` ** 2 / 2 (KL) at every rate; levels are bounded by about `loudness`."""

    def flat(threshold: float) -> Tail:
        return Tail(threshold=threshold, share=0.1, excess=0.0, shape=0.0, n=1000)

    phase = PhaseBand(
        change=flat(change), distance=flat(distance), level=math.log(change / 10), sd=0.0, kl=1e-10, forced=1e-6,
        agreement=1.0, n=1000,
    )  # fmt: skip
    # Student's with this many degrees is normal; at the rates of a single cell its bound is 3 to 4 deviations.
    spread = Spread(cell=math.log(loudness) / 4, group=0.0, degrees=10**6, source="this test")
    return Band(
        name="made", dtype=dtype, model="recipe:x", workload_key="", sources=(), floor=1e-7, prefill=phase,
        decode=phase, spread=spread,
    )  # fmt: skip

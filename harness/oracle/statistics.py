"""The arithmetic of the oracle, on plain arrays: tails, levels, intervals. Nothing here knows a transcript.

Every function is checked against hand-computed values and against scipy (`tests/harness/test_oracle_statistics.py`). A
run does without scipy.stats and scipy.optimize, which take 50 MB: what they call is scipy.special's.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from harness.frozen import Frozen

TAIL_SHARE = 0.1  # of the null's values lie above the tail's threshold
NODES = 40  # of the quadrature over loudness
LEAST_EXCEEDANCES = 5  # fewer say nothing about a tail


class Tail(Frozen):
    """The upper tail of a null: `share` of its `n` values lie above `threshold`, by `excess` on average.

    Beyond the threshold the values are taken as generalised Pareto with `shape`: 0 is exponential, below 0 is lighter,
    above 0 heavier. 0 where no shape was measured; rounding noise of one scale has shapes at or below 0.
    """

    threshold: float
    share: float
    excess: float
    shape: float
    n: int

    @property
    def _law(self) -> tuple[float, float]:
        """(shape, scale) of an exceedance, the tail's own uncertainty included.

        If exceedances are exponential, with a mean estimated from m of them, the next one is Lomax with index m (the
        predictive distribution): a generalised Pareto with shape 1/m. So 1/m is added to the shape, and a null of few
        steps gives a wide band. A generalised Pareto with mean e has scale e (1 - shape).
        """
        return self.shape + 1.0 / max(1.0, self.share * self.n), self.excess * (1.0 - self.shape)

    def point(self, rate: float) -> float:
        """The value that one null step exceeds with probability `rate`."""
        shape, scale = self._law
        if rate >= self.share or scale <= 0:
            return self.threshold
        return self.threshold + scale * _pareto_point(rate / self.share, shape)

    def beyond(self, value: np.ndarray) -> np.ndarray:
        """The probability that one null step exceeds `value`; at most `share`, nothing is known below the threshold."""
        shape, scale = self._law
        if scale <= 0:
            return np.where(value < self.threshold, self.share, 0.0)
        return self.share * _pareto_beyond((value - self.threshold) / scale, shape)

    def scaled(self, factor: float) -> "Tail":
        """The tail of the same values, each times `factor`."""
        return self.model_copy(update={"threshold": self.threshold * factor, "excess": self.excess * factor})

    def bound(self, rate: float, steps: int, spread: float = 0.0) -> float:
        """The value that the largest of `steps` null steps exceeds with probability at most `rate`.

        `spread`: standard deviation of the logarithm of how loud two right servers are as a whole, over which the
        probability is averaged (normal, Gauss-Hermite).
        """
        plain = self.point(rate / max(1, steps))
        if spread <= 0 or self.excess <= 0:
            return plain
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        louder, weights = np.exp(spread * nodes), weights / weights.sum()

        def excess_rate(value: float) -> float:
            return float(weights @ np.minimum(1.0, steps * self.beyond(value / louder))) - rate

        wide = plain * math.exp(spread * float(nodes[-1]))
        return _crossing(excess_rate, plain, wide) if excess_rate(plain) > 0 else plain

    def count_bound(self, point: float, rate: float, steps: int, spread: float = 0.0) -> int:
        """The number of `steps` null steps beyond `point` (above the threshold) that is passed with at most `rate`.

        Binomial, averaged over the loudness of right servers (`spread`, as in `bound`) and over what the null's own
        exceedances leave open of their mean: both move all steps of a cell together, so that a plain binomial would
        alarm far too often.
        """
        if self.excess <= 0:
            return steps if point < self.threshold else 0
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        louder, weights = np.exp(spread * nodes), weights / weights.sum()
        exceedances = max(1.0, self.share * self.n)
        # Of an exponential whose mean was estimated from m values, m · estimate / mean is Gamma(m).
        gammas = special.gammaincinv(exceedances, (np.arange(NODES) + 0.5) / NODES) / exceedances
        scales = self.excess * (1.0 - self.shape) / gammas
        above = np.maximum(0.0, point / louder - self.threshold)[:, None]
        chance = self.share * _pareto_beyond(above / scales[None, :], self.shape)

        def rate_beyond(count: int) -> float:
            # That a binomial exceeds `count` of `steps`, at least one of which stays out: an incomplete beta function.
            return float(weights @ special.betainc(count + 1, steps - count, chance).mean(1))

        low, high = -1, steps  # beyond `low` too often, beyond `high` never
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if rate_beyond(middle) <= rate else (middle, high)
        return high


def _pareto_point(rate: float, shape: float) -> float:
    """What a generalised Pareto of scale 1 exceeds with probability `rate`."""
    return float(-special.boxcox(rate, -shape))


def _pareto_beyond(value: np.ndarray, shape: float) -> np.ndarray:
    """The probability that a generalised Pareto of scale 1 exceeds `value`. One with a shape below 0 has an end."""
    end = -1 / shape if shape < 0 else math.inf
    return special.inv_boxcox(-np.clip(value, 0.0, end), -shape)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where `falling`, above 0 at `low` and not at `high`, is 0; on the far side of it, to 12 digits. Bisection."""
    while high - low > 1e-12 * abs(high):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high


def fit_tail(values: Sequence[float], shape: float = 0.0, share: float = TAIL_SHARE) -> Tail:
    """The tail of `values` (n of them). With few values a larger share of them is taken.

    ValueError for fewer than `LEAST_EXCEEDANCES` + 1 values, or values that are no numbers.
    """
    found = np.sort(np.asarray(values, dtype=float))
    if len(found) <= LEAST_EXCEEDANCES or not np.isfinite(found).all():
        raise ValueError(f"a tail needs more than {LEAST_EXCEEDANCES} finite values, got {len(found)}")
    above = max(LEAST_EXCEEDANCES, round(share * len(found)))
    threshold = float(found[-above - 1])
    excess = float(np.mean(found[-above:] - threshold))
    return Tail(threshold=threshold, share=above / len(found), excess=excess, shape=shape, n=len(found))


class Shape(NamedTuple):
    """A tail's shape, its standard error, and the number of exceedances that it was fitted to."""

    shape: float
    error: float
    n: int

    @property
    def cautious(self) -> float:
        """Two standard errors on the heavy side, and never lighter than exponential.

        A lighter tail would be true of the pairs that it was fitted to. The next pair of right servers is as a whole a
        tenth louder or quieter, and a light tail has no room for that: tried, it alarmed several times too often.
        """
        return max(0.0, self.shape + 2 * self.error)


def fit_shape(samples: Sequence[Sequence[float]], share: float = TAIL_SHARE) -> Shape:
    """The common shape of the tails of `samples`, each scaled by its own threshold. Maximum likelihood."""
    from scipy.stats import genpareto  # for bands that are shipped; no run needs it

    found = []
    for values in samples:
        tail = fit_tail(values, share=share)
        exceedances = np.asarray(values, dtype=float) - tail.threshold
        found.append(exceedances[exceedances > 0] / tail.excess)
    together = np.concatenate(found)
    shape = float(genpareto.fit(together, floc=0)[0])
    return Shape(shape, abs(1 + shape) / math.sqrt(len(together)), len(together))


class Level(NamedTuple):
    """Mean, standard deviation and number of the logarithms of values: how loud something is."""

    mean: float
    sd: float
    n: int


def level(values: Sequence[float], floor: float) -> Level:
    """`Level` of `values`, each taken as at least `floor` (> 0). sd is 0 for a single value."""
    logs = np.log(np.maximum(np.asarray(values, dtype=float), floor))
    return Level(float(np.mean(logs)), float(np.std(logs, ddof=1)) if len(logs) > 1 else 0.0, len(logs))


class Interval(NamedTuple):
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of `values`; unbounded for a single one."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Interval(-math.inf, math.inf)
    half = float(special.stdtrit(n - 1, 0.5 + confidence / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean - half, mean + half)


def bootstrap_interval(
    sums: Sequence[float], counts: Sequence[int], confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of `sum(sums) / sum(counts)` when whole groups (prompts) are drawn again.

    Steps of one prompt depend on each other, prompts do not: so prompts are drawn, not steps.
    """
    total, number = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    random = np.random.Generator(np.random.PCG64(seed))
    chosen = random.integers(0, len(total), size=(draws, len(total)))
    means = total[chosen].sum(axis=1) / number[chosen].sum(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def exact_interval(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a share: `hits` of `n`."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1 - tail))
    return Interval(low, high)


def upper_share(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound of a share: `hits` of `n`."""
    return 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, confidence))


def level_bound(rate: float, error: float, degrees: float) -> float:
    """How far a difference of levels with standard error `error` goes by chance, one-sided, at `rate`.

    Student's, because `error` is itself estimated with `degrees` degrees of freedom.
    """
    return float(-special.stdtrit(degrees, rate) * error)

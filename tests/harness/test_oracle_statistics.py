"""The oracle's arithmetic: values worked out by hand, and scipy's answers to the same questions."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from harness.oracle.statistics import (
    Interval,
    Shape,
    Tail,
    bootstrap_interval,
    exact_interval,
    fit_shape,
    fit_tail,
    level,
    level_bound,
    mean_interval,
    upper_share,
)

# A tenth of the null lies above 2.0, by 0.5 on average; n is so large that the tail is known.
KNOWN = Tail(threshold=2.0, share=0.1, excess=0.5, shape=0.0, n=10**12)


def test_an_exponential_tail_by_hand():
    # P(x > 2 + t) = 0.1 exp(-t / 0.5); a thousandth is reached where exp(-t / 0.5) = 0.01: t = 0.5 ln 100.
    assert KNOWN.point(1e-3) == pytest.approx(2.0 + 0.5 * math.log(100), rel=1e-6)
    assert KNOWN.point(0.1) == KNOWN.point(0.5) == 2.0  # nothing is known below the threshold
    # The largest of 50 steps at 5 %: each step may take a fiftieth of it, a thousandth.
    assert KNOWN.bound(0.05, 50) == KNOWN.point(1e-3)


@pytest.mark.parametrize("shape", [-0.2, 0.1, 0.3])
def test_a_tail_is_scipys_generalised_pareto(shape):
    tail = KNOWN.model_copy(update={"shape": shape})
    for rate in (1e-2, 1e-4, 1e-7):
        wanted = 2.0 + stats.genpareto.isf(rate / 0.1, shape, scale=0.5 * (1 - shape))  # mean scale / (1 - shape)
        assert tail.point(rate) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.1])
def test_bounds_are_those_of_scipys_distributions_and_root_finder(shape):
    """The same sums over loudness, written with scipy.stats and scipy.optimize."""
    tail = Tail(threshold=1e-5, share=0.1, excess=3e-6, shape=shape, n=800)
    wide, scale = shape + 1 / 80, 3e-6 * (1 - shape)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    louder, weights = np.exp(0.2 * nodes), weights / weights.sum()

    def rate_beyond(value: float) -> float:
        beyond = 0.1 * stats.genpareto.sf(value / louder - 1e-5, wide, scale=scale)
        return float(weights @ np.minimum(1.0, 400 * beyond))

    wanted = optimize.brentq(lambda value: rate_beyond(value) - 1e-4, tail.point(1e-4 / 400), 1e-3, xtol=1e-20)
    assert tail.bound(1e-4, 400, 0.2) == pytest.approx(wanted, rel=1e-9)

    point = tail.point(1e-3)
    scales = scale / (stats.gamma.ppf((np.arange(40) + 0.5) / 40, 80) / 80)
    above = np.maximum(0.0, point / louder - 1e-5)[:, None]
    chance = 0.1 * stats.genpareto.sf(above, shape, scale=scales)
    rates = [float(weights @ stats.binom.sf(count, 400, chance).mean(1)) for count in range(400)]
    for rate in (0.05, 1e-3, 1e-5, 1e-7):
        assert tail.count_bound(point, rate, 400, 0.2) == next(n for n, found in enumerate(rates) if found <= rate)


def test_the_spread_of_loudness_widens_a_bound_as_a_simulation_says():
    # A million right servers, each louder or quieter by exp(0.1 z), the largest of 50 steps of each.
    random = np.random.Generator(np.random.PCG64(11))
    louder = np.exp(0.1 * random.standard_normal(10**6))
    # Largest of 50 exponential tails: all 50 stay below x with probability (1 - share · exp(...)) ** 50.
    largest = 2.0 - 0.5 * np.log((1 - random.random(10**6) ** (1 / 50)) / 0.1)
    wanted = np.quantile(louder * largest, 1 - 1e-3)
    assert KNOWN.bound(1e-3, 50, 0.1) == pytest.approx(wanted, rel=0.01)
    assert KNOWN.bound(1e-3, 50, 0.1) > 1.04 * KNOWN.bound(1e-3, 50)
    assert KNOWN.bound(1e-3, 50, 0.0) == KNOWN.bound(1e-3, 50)


def test_what_lies_beyond_a_point_is_its_rate():
    for rate in (0.05, 1e-3, 1e-6):
        assert KNOWN.beyond(np.array([KNOWN.point(rate)])) == pytest.approx([rate])
    assert KNOWN.beyond(np.array([0.0, 2.0])) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.25])
def test_a_shape_is_found_across_samples_of_different_size(shape):
    random = np.random.Generator(np.random.PCG64(5))
    samples = [
        scale * (10 + stats.genpareto.rvs(shape, size=400, random_state=random))
        for scale in (1e-5, 1.0)
        for _ in "1234"
    ]
    found = fit_shape(samples, share=0.5)
    assert found.n == 8 * 200
    assert abs(found.shape - shape) < 4 * found.error < 0.15
    assert found.cautious >= max(0.0, found.shape)


def test_a_light_shape_is_not_made_use_of():
    assert Shape(-0.3, 0.05, 100).cautious == 0.0
    assert Shape(0.1, 0.05, 100).cautious == pytest.approx(0.2)


def test_few_exceedances_widen_the_tail_as_their_predictive_distribution_says():
    # From m exponential exceedances with mean e, the next one is Lomax with index m and scale m e.
    tail = Tail(threshold=2.0, share=0.1, excess=0.5, shape=0.0, n=100)
    for rate in (1e-2, 1e-4):
        wanted = 2.0 + stats.lomax.isf(rate / 0.1, 10, scale=10 * 0.5)
        assert tail.point(rate) == pytest.approx(wanted, rel=1e-6)
    assert tail.point(1e-4) > KNOWN.point(1e-4)


def test_a_fit_by_hand():
    # 1 … 20: a tenth is two values, but at least five are taken: 16 … 20, above 15 by 3 on average.
    tail = fit_tail(range(20, 0, -1))
    assert (tail.threshold, tail.share, tail.excess, tail.n) == (15.0, 0.25, 3.0, 20)
    # 1 … 100: a tenth is ten values, 91 … 100, above 90 by 5.5.
    tail = fit_tail(range(1, 101))
    assert (tail.threshold, tail.share, tail.excess) == (90.0, 0.1, 5.5)


def test_too_few_values_have_no_tail():
    assert fit_tail([1, 2, 3, 4, 5, 6]).threshold == 1
    for values in ([1, 2, 3, 4, 5], [], [1, 2, 3, 4, 5, math.inf, 7], [math.nan] * 9):
        with pytest.raises(ValueError, match="a tail needs more than 5 finite values"):
            fit_tail(values)


@pytest.mark.parametrize("draw", ["exponential", "half normal", "largest of 20 normals"])
def test_the_largest_of_a_clean_cell_passes_its_bound_no_oftener_than_stated(draw):
    """100 values of null, 100 of a cell, 500 times: alarms at 5 % stay within what 5 % allows (99.9 %)."""
    random = np.random.Generator(np.random.PCG64(7))

    def values() -> np.ndarray:
        if draw == "exponential":
            return random.exponential(size=100)
        normals = np.abs(random.standard_normal((100, 20 if "20" in draw else 1)))
        return normals.max(axis=1)

    alarms = sum(values().max() > fit_tail(values()).bound(0.05, 100) for _ in range(500))
    assert alarms <= stats.binom.isf(1e-3, 500, 0.05)
    if draw == "exponential":  # the model's own case: neither too wide
        assert alarms >= stats.binom.isf(1 - 1e-3, 500, 0.02)


def test_levels_by_hand():
    found = level([1.0, math.e**2, 0.0], floor=math.e)  # logs 1, 2, 1: what is below the floor is taken as it
    assert found.mean == pytest.approx(4 / 3) and found.n == 3
    assert found.sd == pytest.approx(math.sqrt(((1 / 3) ** 2 * 2 + (2 / 3) ** 2) / 2))
    assert level([5.0], floor=1.0).sd == 0


def test_the_interval_of_a_mean_is_scipys():
    values = [0.3, -0.2, 0.9, 0.4, 0.1]
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((wanted.low, wanted.high))
    assert mean_interval([1.0]) == Interval(-math.inf, math.inf)


def test_the_bootstrap_over_prompts_is_scipys():
    random = np.random.Generator(np.random.PCG64(1))
    counts = random.integers(1, 30, size=25)
    sums = counts * random.normal(2.0, 1.0, size=25)
    wanted = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, method="percentile",
        n_resamples=20_000, random_state=3, vectorized=True,
    ).confidence_interval  # fmt: skip
    assert bootstrap_interval(sums, counts, draws=20_000) == pytest.approx((wanted.low, wanted.high), abs=0.02)


def test_the_bootstrap_draws_prompts_not_steps():
    # Two prompts of 100 steps each, all 0 and all 1: 200 steps would give the mean to 0.07, 2 prompts do not.
    assert bootstrap_interval([0, 100], [100, 100]) == Interval(0.0, 1.0)
    assert bootstrap_interval([6.0], [3]) == Interval(2.0, 2.0)  # a single prompt: nothing to draw


@pytest.mark.parametrize(("hits", "n"), [(0, 600), (1, 600), (7, 20), (20, 20)])
def test_exact_intervals_are_scipys(hits, n):
    wanted = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert exact_interval(hits, n) == pytest.approx((wanted.low, wanted.high))
    upper = stats.binomtest(hits, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_share(hits, n) == pytest.approx(upper)


def test_no_alarm_in_n_by_hand():
    # (1 - p) ** n = 0.05: with n = 600, p = 0.498 %; with 298 it is still above 1 %.
    assert upper_share(0, 600) == pytest.approx(1 - 0.05 ** (1 / 600))
    assert upper_share(0, 298) > 0.01 > upper_share(0, 299)


def test_a_level_bound_is_students():
    assert level_bound(0.025, 2.0, 10) == pytest.approx(2.0 * stats.t.ppf(0.975, 10))
    assert level_bound(0.025, 1.0, 10**7) == pytest.approx(1.959964, rel=1e-4)


def test_a_count_beyond_a_point_is_binomial_where_all_is_known():
    """A million exceedances and no spread: of 1,000 steps each beyond with 1 in 1,000, more than 6 come 1 in 12,000.

    Poisson with mean 1: P(> 5) = 5.9e-4, P(> 6) = 8.3e-5.
    """
    tail = Tail(threshold=1.0, share=0.1, excess=0.5, shape=0.0, n=10**7)
    point = 1.0 + 0.5 * math.log(100)  # beyond it lies a hundredth of a tenth
    assert tail.count_bound(point, 6e-4, 1000) == 5
    assert tail.count_bound(point, 5.8e-4, 1000) == 6
    assert tail.count_bound(point, 1e-4, 1000) == 6
    assert tail.count_bound(point, 8e-5, 1000) == 7


def test_what_is_not_known_of_the_null_widens_the_bound_of_a_count():
    sure = Tail(threshold=1.0, share=0.1, excess=0.5, shape=0.0, n=10**7)
    point = 1.0 + 0.5 * math.log(100)
    few = sure.model_copy(update={"n": 300})
    assert few.count_bound(point, 1e-4, 1000) > sure.count_bound(point, 1e-4, 1000)
    assert sure.count_bound(point, 1e-4, 1000, spread=0.2) > sure.count_bound(point, 1e-4, 1000)
    flat = sure.model_copy(update={"excess": 0.0})
    assert (flat.count_bound(1.0, 1e-4, 1000), flat.count_bound(0.9, 1e-4, 1000)) == (0, 1000)


def test_counts_of_clean_cells_pass_their_bound_as_rarely_as_stated():
    """Nulls of 300 exponential steps, cells of 400, each cell's loudness drawn with a spread of 0.15: 4,000 pairs."""
    random = np.random.Generator(np.random.PCG64(5))
    alarms, pairs = {0.1: 0, 0.01: 0}, 4000
    bounds: dict[tuple, int] = {}
    for _ in range(pairs):
        tail = fit_tail(random.exponential(size=300))
        point = tail.point(1e-3)
        cell = random.exponential(size=400) * math.exp(0.15 * random.standard_normal())
        beyond = int((cell > point).sum())
        if not beyond:
            continue  # no bound is below 0
        for rate in alarms:
            key = (rate, round(tail.threshold / tail.excess, 1))
            if key not in bounds:
                bounds[key] = tail.count_bound(point, rate, 400, 0.15)
            alarms[rate] += beyond > bounds[key]
    assert alarms[0.1] / pairs < 0.1 and alarms[0.01] / pairs < 0.01

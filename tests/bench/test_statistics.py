"""Statistics by hand, by exact arithmetic, and by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from rkd_deploy.bench.statistics import Timing, interval_ranks
from rkd_deploy.errors import UsageError


def timing(samples, **options):
    facts = {"batch": 1, "transfers": True, "first_run_ms": 0.0, "warmup_runs": 0, "warmup_seconds": 0.0}
    return Timing(samples_ms=tuple(samples), **(facts | options))


def test_percentiles_are_nearest_rank():
    ten = timing([10, 1, 9, 2, 8, 3, 7, 4, 6, 5])
    assert [ten.percentile(q) for q in (1, 10, 11, 50, 90, 91, 95, 99, 100)] == [1, 1, 2, 5, 9, 10, 10, 10, 10]
    assert ten.p50 == 5
    hundred = timing(range(1, 101))
    assert [hundred.percentile(q) for q in range(1, 101)] == list(range(1, 101))
    for q in (0, -1, 101):
        with pytest.raises(UsageError, match="Percentile"):
            ten.percentile(q)


def test_mean_and_variation():
    four = timing([2.0, 4.0, 4.0, 6.0], batch=8)
    assert four.mean == 4
    assert four.cv == pytest.approx(math.sqrt(8 / 3) / 4)
    assert four.throughput_per_s == 8 * 4 / 0.016
    assert timing([3.0]).cv == 0


def exact_ranks(count, share, confidence):
    """The definition in `Timing.interval`, in exact fractions."""
    share, tail = Fraction(share), (1 - Fraction(confidence)) / 2
    cdf, total = [], Fraction(0)
    for k in range(count + 1):
        total += math.comb(count, k) * share**k * (1 - share) ** (count - k)
        cdf.append(total)
    low = max((rank for rank in range(1, count + 1) if cdf[rank - 1] <= tail), default=None)
    high = min((rank for rank in range(1, count + 1) if cdf[rank - 1] >= 1 - tail), default=None)
    return low, high


@pytest.mark.parametrize("count", [1, 5, 6, 10, 29, 100])
@pytest.mark.parametrize("share", ["1/2", "9/10", "99/100"])
def test_interval_ranks_equal_exact_arithmetic(count, share):
    expected = exact_ranks(count, share, "19/20")
    assert interval_ranks(count, float(Fraction(share)), 0.95) == expected


def test_interval_ranks_of_the_median_equal_the_printed_tables():
    # Conover 1999, table of the sign test: 95 % intervals of the median.
    assert interval_ranks(10, 0.5, 0.95) == (2, 9)
    assert interval_ranks(20, 0.5, 0.95) == (6, 15)


def test_interval_gives_samples_or_says_that_there_are_too_few():
    assert timing(range(1, 21)).interval(50) == (6, 15)
    assert timing(range(1, 6)).interval(50) == (-math.inf, math.inf)
    assert timing(range(1, 101)).interval(99) == (97, math.inf)  # P(B <= 96) = 0.018, P(B <= 97) = 0.079
    with pytest.raises(UsageError, match="confidence"):
        timing([1]).interval(50, confidence=1.0)


def test_interval_covers_the_true_percentile_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth = math.log(10)  # the 90th percentile of the exponential distribution
    hits = 0
    for _ in range(400):
        low, high = timing(generator.exponential(size=200)).interval(90)
        hits += low <= truth <= high
    assert 0.93 <= hits / 400 <= 0.995


def test_interval_is_quick_for_many_samples():
    low, high = interval_ranks(200_000, 0.5, 0.95)
    assert low == pytest.approx(100_000 - 1.96 * math.sqrt(50_000), abs=2)
    assert high == pytest.approx(100_000 + 1.96 * math.sqrt(50_000), abs=2)


def test_p99_9_is_the_nearest_rank_too():
    assert timing(range(1, 1001)).percentile(99.9) == 999
    assert timing(range(1, 3001)).percentile(99.9) == 2997
    assert timing(range(1, 1502)).percentile(99.9) == 1500  # ceil(1499.499)
    assert timing(range(1, 11)).percentile(99.9) == 10


def drifting(generator, turns, per_turn, spread):
    """Samples whose turns share a shift: log-normal, so that the true median is 1."""
    shifts = np.repeat(generator.normal(0, spread, turns), per_turn)
    return timing(np.exp(shifts + generator.normal(0, 0.05, turns * per_turn)), rounds=(per_turn,) * turns)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_intervals_cover_when_turns_differ_where_independent_ones_would_not(spread):
    generator = np.random.default_rng(0)
    clustered = independent = 0
    for _ in range(200):
        samples = drifting(generator, 20, 50, spread)
        low, high = samples.interval(50)
        clustered += low <= 1 <= high
        low, high = timing(samples.samples_ms).interval(50)
        independent += low <= 1 <= high
    assert clustered >= 180  # 95 % of 200, less 3 standard deviations
    if spread:
        assert independent < 140


def test_the_design_effect_is_the_ratio_of_variances():
    # Two turns of 4: one all below the median of both, one all above it. p = 1/2, y = (4, 0), n_j = 4:
    # Var(p) = 2/1 * (4 + 4) / 64 = 1/4 against p (1 - p) / n = 1/32, so 8; t is 12.706 at one degree of freedom.
    samples = timing([1, 2, 3, 4, 5, 6, 7, 8], rounds=(4, 4))
    # The expansion of t that is used gives less there, and is good from 5 degrees on (next test).
    assert 8 * 4 < samples.design_effect(50) < 8 * (12.706 / 1.96) ** 2
    # Equal turns are no worse than independent samples, and never counted as better.
    assert timing([1, 3, 5, 7, 2, 4, 6, 8], rounds=(4, 4)).design_effect(50) == 1
    assert timing([1, 2, 3]).design_effect(50) == 1


@pytest.mark.parametrize(("freedom", "t"), [(5, 2.571), (9, 2.262), (19, 2.093), (99, 1.984)])
def test_the_small_sample_factor_is_students(freedom, t):
    """t as printed in every table at 97.5 %."""
    m = freedom + 1
    # One sample a turn, half of them below: y is 0 or 1, Var(p) = m/(m-1) * m/4 / m^2, the effect m/(m-1) * (t/z)^2.
    samples = timing([1, 9] * (m // 2), rounds=(1,) * m)
    assert samples.design_effect(50) == pytest.approx(m / (m - 1) * (t / 1.959964) ** 2, rel=0.02)


def test_throughput_counts_every_stream():
    assert timing([2.0, 2.0], batch=8, streams=3).throughput_per_s == 3 * 8 * 1000 / 2.0

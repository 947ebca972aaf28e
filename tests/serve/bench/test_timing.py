"""Timing against a clock that the tests turn: every number is known beforehand."""

import math
from fractions import Fraction
from itertools import cycle

import numpy as np
import pytest

from rkd_deploy.errors import UsageError
from rkd_deploy.serve.backends import load_backend
from rkd_deploy.serve.bench.timing import Timing, interval_ranks, measure, measure_interleaved

X = np.zeros((4, 1), np.float32)
MS = 1_000_000


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


class Scripted:
    """A backend whose n-th call takes the n-th duration, in ms; enqueueing takes none, waiting takes it all."""

    name = "scripted"

    def __init__(self, clock, durations, log=None):
        self.clock, self.durations, self.calls = clock, iter(durations), 0
        self.log = log if log is not None else []

    def infer(self, x):
        self.calls += 1
        self.log.append(self)
        self.clock.now += int(next(self.durations) * MS)

    def prepare(self, x):
        return lambda: None

    def synchronize(self):
        self.infer(None)


def timing(samples, **options):
    facts = {"batch": 1, "transfers": True, "first_run_ms": 0.0, "warmup_runs": 0, "warmup_seconds": 0.0}
    return Timing(samples_ms=tuple(samples), **(facts | options))


@pytest.mark.parametrize("transfers", [True, False])
def test_first_call_warm_up_and_samples_are_kept_apart(transfers):
    clock = Clock()
    backend = Scripted(clock, [50, *[7] * 4, *[1, 2, 3, 4]])
    found = measure(
        backend, X, min_seconds=0.01, min_runs=3, warmup_seconds=0, warmup_runs=4, transfers=transfers, clock=clock
    )
    assert found.first_run_ms == 50
    assert (found.warmup_runs, found.warmup_seconds) == (4, 0.028)
    assert found.samples_ms == (1, 2, 3, 4)
    assert found.transfers is transfers
    assert found.throughput_per_s == 4 * 4 / 0.010


@pytest.mark.parametrize(
    ("seconds", "runs", "expected"),
    [(0.010, 3, 10), (0.010, 15, 15), (0, 1, 1), (0.250, 1, 250)],
)
def test_limits_hold_by_time_and_by_count(seconds, runs, expected):
    clock = Clock()
    limits = {"min_seconds": seconds, "min_runs": runs, "warmup_seconds": seconds, "warmup_runs": runs}
    found = measure(Scripted(clock, cycle([1])), X, clock=clock, **limits)
    assert len(found.samples_ms) == expected
    assert found.warmup_runs == expected


def test_models_take_turns_and_the_order_turns_round():
    clock, log = Clock(), []
    fast, slow = Scripted(clock, cycle([10]), log), Scripted(clock, cycle([30]), log)
    found = measure_interleaved(
        {"fast": (fast, X), "slow": (slow, X)},
        min_seconds=0.3,
        min_runs=1,
        warmup_seconds=0,
        warmup_runs=1,
        clock=clock,
    )
    rounds = []
    for backend in log[4:]:  # the first calls and the warm-up
        if rounds and rounds[-1][0] is backend:
            rounds[-1][1] += 1
        else:
            rounds.append([backend, 1])
    # 0.1 s each, and one untimed call after each change of model: 10 and 1, or 4 and 1; A B, B A, A B.
    assert [(backend is fast, calls) for backend, calls in rounds] == [(1, 11), (0, 10), (1, 22), (0, 3)]
    assert found["fast"].samples_ms == (10,) * 30
    assert found["slow"].samples_ms == (30,) * 10
    assert found["fast"].warmup_runs == 1 + 3


def test_drift_hits_interleaved_models_alike():
    clock = Clock()

    class Drifting(Scripted):
        def infer(self, x):
            clock.now += int((1 + clock.now / (2_000 * MS)) * MS)  # every machine time doubles within 2 s

    limits = {"min_seconds": 0, "min_runs": 500, "warmup_seconds": 0, "warmup_runs": 0, "clock": clock}
    models = {name: (Drifting(clock, []), X) for name in "ab"}
    apart = {name: measure(*models[name], **limits).mean for name in "ab"}
    together = {name: timing.mean for name, timing in measure_interleaved(models, **limits).items()}
    assert apart["b"] / apart["a"] > 1.2
    assert together["b"] / together["a"] == pytest.approx(1, abs=0.03)


def test_progress_is_told():
    clock, told = Clock(), []
    measure(
        Scripted(clock, cycle([10])),
        X,
        min_seconds=0.25,
        min_runs=1,
        warmup_runs=0,
        warmup_seconds=0,
        clock=clock,
        progress=lambda name, share: told.append((name, share)),
    )
    assert told == [("scripted", 0.4), ("scripted", 0.8), ("scripted", 1.0)]


def test_a_real_backend_is_timed_both_ways(bundle, zoo):
    with load_backend("onnxruntime", bundle, threads=1) as backend:
        for transfers in (True, False):
            found = measure(backend, zoo.pixels(2), min_seconds=0.02, warmup_seconds=0.01, transfers=transfers)
            assert len(found.samples_ms) >= 100
            assert 0 < found.p50 <= found.p90 <= found.p99 <= max(found.samples_ms)


@pytest.mark.parametrize("limits", [{"min_runs": 0}, {"min_seconds": -1}, {"warmup_seconds": -1}, {"warmup_runs": -1}])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(UsageError, match="none may be negative"):
        measure(Scripted(Clock(), []), X, **limits)


def test_percentiles_are_nearest_rank():
    ten = timing([10, 1, 9, 2, 8, 3, 7, 4, 6, 5])
    assert [ten.percentile(q) for q in (1, 10, 11, 50, 90, 91, 95, 99, 100)] == [1, 1, 2, 5, 9, 10, 10, 10, 10]
    assert (ten.p50, ten.p90, ten.p95, ten.p99) == (5, 9, 10, 10)
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

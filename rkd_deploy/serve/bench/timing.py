"""How long one call takes: wall time, every sample kept.

One sample is one call: `Backend.infer`, host to host, or one device-resident run and the wait for its end. Percentiles
are nearest rank: the q-th is the ceil(q/100 * n)-th smallest sample, always one that was measured. The first call is
timed apart, because it pays for allocation and kernel choice; warm-up lasts for a time and a count, whichever is later.

Not covered: samples of one process are not independent (clocks, neighbours), so an interval here is the least one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from rkd_deploy.errors import UsageError
from rkd_deploy.serve.backends.protocol import Array, Backend

Clock = Callable[[], int]
"""Nanoseconds since some fixed instant."""
Progress = Callable[[str, float], None]
"""Called with a model's name and the share of its measurement that is done, 0 to 1."""

ROUND_NS = 100_000_000
"""How long one model runs before the next one has its turn."""


@dataclass(frozen=True)
class Timing:
    """The samples of one model at one batch size, and what follows from them; durations in ms."""

    samples_ms: tuple[float, ...]
    """In the order they were measured."""
    batch: int
    transfers: bool
    """True: host to host. False: input and output stay on the device."""
    first_run_ms: float
    warmup_runs: int
    """Untimed calls, those after each change of model included."""
    warmup_seconds: float
    rounds: tuple[int, ...] = ()
    """How many of the samples fell into each turn of 0.1 s, in order: drift is within turns small, between them not."""

    @cached_property
    def round_medians_ms(self) -> tuple[float, ...]:
        """Median (nearest rank) of each turn, in order."""
        ends = np.cumsum(self.rounds).tolist()
        turns = [sorted(self.samples_ms[end - count : end]) for end, count in zip(ends, self.rounds, strict=True)]
        return tuple(turn[_rank(50, len(turn)) - 1] for turn in turns)

    @cached_property
    def _sorted(self) -> tuple[float, ...]:
        return tuple(sorted(self.samples_ms))

    def percentile(self, q: float) -> float:
        """The nearest-rank percentile: the smallest sample with at least q percent of all at or below it.

        Raises:
            UsageError: `q` is not above 0 and at most 100.
        """
        _check_percentile(q)
        return self._sorted[_rank(q, len(self._sorted)) - 1]

    @property
    def p50(self) -> float:
        """Median, nearest rank."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """90th percentile, nearest rank."""
        return self.percentile(90)

    @property
    def p95(self) -> float:
        """95th percentile, nearest rank."""
        return self.percentile(95)

    @property
    def p99(self) -> float:
        """99th percentile, nearest rank."""
        return self.percentile(99)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return math.fsum(self.samples_ms) / len(self.samples_ms)

    @property
    def cv(self) -> float:
        """Coefficient of variation: sample standard deviation over mean, no unit; 0 for a single sample."""
        return float(np.std(self.samples_ms, ddof=1)) / self.mean if len(self.samples_ms) > 1 else 0.0

    @property
    def throughput_per_s(self) -> float:
        """Images per second of one caller that never waits: batch * calls / time in calls."""
        return 1000 * self.batch * len(self.samples_ms) / math.fsum(self.samples_ms)

    def interval(self, q: float, confidence: float = 0.95) -> tuple[float, float]:
        """Distribution-free confidence interval of a percentile, from binomial order statistics.

        The number of samples below the true percentile is binomial, B ~ Bin(n, q/100), whatever the distribution, so
        P(X_(l) <= percentile <= X_(u)) >= P(l <= B <= u - 1). With a = (1 - confidence) / 2, l is the largest rank with
        P(B <= l - 1) <= a, and u the smallest with P(B <= u - 1) >= 1 - a.
        Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2; David and Nagaraja, Order Statistics,
        3rd ed. 2003, section 7.1.

        Returns:
            Low and high end in ms; -inf or inf where so few samples bound it on no side.

        Raises:
            UsageError: `q` or `confidence` lies outside its range.
        """
        _check_percentile(q)
        if not 0 < confidence < 1:
            raise UsageError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")
        low, high = interval_ranks(len(self._sorted), q / 100, confidence)
        return (
            -math.inf if low is None else self._sorted[low - 1],
            math.inf if high is None else self._sorted[high - 1],
        )


def interval_ranks(count: int, share: float, confidence: float) -> tuple[int | None, int | None]:
    """Ranks, from 1, of the two order statistics of `Timing.interval`; None where no rank is extreme enough.

    Args:
        count: Number of samples.
        share: The percentile as a share, above 0 and at most 1.
        confidence: Above 0 and below 1.
    """
    if share == 1:
        return count, None
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    k = np.arange(count + 1)
    log_choose = log_factorial[count] - log_factorial[k] - log_factorial[count - k]
    cdf = np.cumsum(np.exp(log_choose + k * math.log(share) + (count - k) * math.log1p(-share)))
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(cdf, tail, side="right"))
    high = int(np.searchsorted(cdf, 1 - tail, side="left")) + 1
    return low or None, high if high <= count else None


def measure(
    backend: Backend,
    x: Array,
    *,
    min_seconds: float = 2.0,
    min_runs: int = 100,
    warmup_seconds: float = 0.5,
    warmup_runs: int = 10,
    transfers: bool = True,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
) -> Timing:
    """Time one model.

    Args:
        backend: The model.
        x: [N, ...], one batch.
        min_seconds: Time in timed calls, at least.
        min_runs: Number of timed calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
        clock: Nanoseconds.
        progress: Told how far the measurement is.

    Raises:
        UsageError: A limit is negative, or `x` does not fit the model.
        BackendError: A run failed.
    """
    return measure_interleaved(
        {backend.name: (backend, x)},
        min_seconds=min_seconds,
        min_runs=min_runs,
        warmup_seconds=warmup_seconds,
        warmup_runs=warmup_runs,
        transfers=transfers,
        clock=clock,
        progress=progress,
    )[backend.name]


def measure_interleaved(
    models: Mapping[str, tuple[Backend, Array]],
    *,
    min_seconds: float = 2.0,
    min_runs: int = 100,
    warmup_seconds: float = 0.5,
    warmup_runs: int = 10,
    transfers: bool = True,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time several models by turns of 0.1 s, so that the drift of a shared machine hits all alike.

    The order turns round after each round, and the first call after a change of model is not counted: it finds
    the caches full of the other one.

    Args:
        models: Backend and batch by name; the rest as for `measure`, and each limit holds for each model.
        min_seconds: Time in timed calls, at least.
        min_runs: Number of timed calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
        clock: Nanoseconds.
        progress: Told how far each measurement is.

    Raises:
        UsageError: A limit is negative, or an input does not fit its model.
        BackendError: A run failed.
    """
    if min_seconds < 0 or warmup_seconds < 0 or warmup_runs < 0 or min_runs < 1:
        raise UsageError(
            f"min_seconds={min_seconds}, warmup_seconds={warmup_seconds}, warmup_runs={warmup_runs} and "
            f"min_runs={min_runs} were given; none may be negative, and min_runs must be at least 1."
        )
    runners = [_Runner(name, backend, x, transfers, clock) for name, (backend, x) in models.items()]
    for runner in runners:
        runner.warm_up(int(warmup_seconds * 1e9), warmup_runs)
    min_ns = int(min_seconds * 1e9)
    pending = runners
    while pending:
        for runner in pending:
            if len(runners) > 1:
                runner.warm_up(0, 1)
            runner.run_round(min_ns, min_runs)
            if progress is not None:
                progress(runner.name, runner.done(min_ns, min_runs))
        pending = [runner for runner in reversed(pending) if runner.done(min_ns, min_runs) < 1]
    return {runner.name: runner.timing() for runner in runners}


class _Runner:
    """One model under measurement: its call, and the samples so far."""

    def __init__(self, name: str, backend: Backend, x: Array, transfers: bool, clock: Clock) -> None:
        self.name = name
        self._call: Callable[[], object] = partial(backend.infer, x) if transfers else _resident(backend, x)
        self._clock = clock
        self._batch, self._transfers = len(x), transfers
        self._samples: list[int] = []
        self._rounds: list[int] = []
        self._total = 0
        self._warmups = 0
        self._warmup_total = 0
        self._first = self._time()

    def warm_up(self, min_ns: int, min_runs: int) -> None:
        total = runs = 0
        while total < min_ns or runs < min_runs:
            total += self._time()
            runs += 1
        self._warmups += runs
        self._warmup_total += total

    def run_round(self, min_ns: int, min_runs: int) -> None:
        end, before = self._total + ROUND_NS, len(self._samples)
        while self._total < end and self.done(min_ns, min_runs) < 1:
            sample = self._time()
            self._samples.append(sample)
            self._total += sample
        self._rounds.append(len(self._samples) - before)

    def done(self, min_ns: int, min_runs: int) -> float:
        """Share of the measurement that is done; 1 when both limits are reached."""
        return min(1.0, self._total / min_ns if min_ns else 1.0, len(self._samples) / min_runs)

    def timing(self) -> Timing:
        return Timing(
            samples_ms=tuple(sample / 1e6 for sample in self._samples),
            batch=self._batch,
            transfers=self._transfers,
            first_run_ms=self._first / 1e6,
            warmup_runs=self._warmups,
            warmup_seconds=self._warmup_total / 1e9,
            rounds=tuple(self._rounds),
        )

    def _time(self) -> int:
        start = self._clock()
        self._call()
        return self._clock() - start


def _resident(backend: Backend, x: Array) -> Callable[[], None]:
    enqueue = backend.prepare(x)

    def run() -> None:
        enqueue()
        backend.synchronize()

    return run


def _rank(q: float, count: int) -> int:
    # In whole numbers where q is one: 0.9 * 10 is 9.000000000000002 in floats, and its ceiling 10.
    return max(1, math.ceil(q * count / 100))


def _check_percentile(q: float) -> None:
    if not 0 < q <= 100:
        raise UsageError(f"Percentile {q} was asked for; it must be above 0 and at most 100.")

"""Times calls of loaded models: wall time, by turns, with every sample.

One sample is one call: `Backend.infer`, host to host, or one device-resident run and the wait for its end. The first
call is timed apart, because it pays for allocation and kernel choice; warm-up lasts for a time and a count, whichever
is later. Several streams are several callers at once, each with a loaded model of its own, as servers run them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from rkd_deploy.backends.protocol import Array, Backend, Progress
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.fields import check_number

__all__ = [
    "Clock",
    "TimingLimits",
    "MeasurementInterrupted",
    "Progress",
    "Timing",
    "Workload",
    "measure",
    "measure_workloads",
]

Clock = Callable[[], int]
"""Gives nanoseconds since some fixed instant."""

_LONGEST, _MOST_RUNS = 86_400, 10**9
"""Largest limits in seconds and runs: a day, or as many calls of 0.1 ms; every sample stays in memory."""

ROUND_NS = 100_000_000
"""How long one model runs before the next one has its turn."""


@dataclass(frozen=True, kw_only=True)
class TimingLimits:
    """How long a workload is timed: until every one of these is reached.

    Attributes:
        min_seconds: Time in timed calls of each stream, at least.
        min_runs: Number of timed calls of all streams, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.

    Raises:
        UsageError: A limit is no finite number, negative or too large, or `min_runs` is below 1.
    """

    min_seconds: float = 2.0
    min_runs: int = 100
    warmup_seconds: float = 0.5
    warmup_runs: int = 10

    def __post_init__(self) -> None:
        check_number("min_seconds", self.min_seconds, 0, _LONGEST)
        check_number("min_runs", self.min_runs, 1, _MOST_RUNS, whole=True)
        check_number("warmup_seconds", self.warmup_seconds, 0, _LONGEST)
        check_number("warmup_runs", self.warmup_runs, 0, _MOST_RUNS, whole=True)


@dataclass(frozen=True)
class Workload:
    """A loaded model and the batch it is timed on.

    Attributes:
        backends: The loaded model; for several streams, one of its own for each.
        x: [N, ...], one batch.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
    """

    backends: Sequence[Backend]
    x: Array
    transfers: bool = True


class Runner:
    """One workload under measurement: its streams, and the samples so far."""

    def __init__(self, name: str, workload: Workload, limits: TimingLimits, clock: Clock) -> None:
        self.name = name
        self._workload = workload
        self._min_ns, self._min_runs = int(limits.min_seconds * 1e9), limits.min_runs
        self._samples: list[int] = []
        self._rounds: list[int] = []
        self._paces_ms: list[float] = []
        self._total = 0
        self._warmups = 0
        self._warmup_total = 0
        threads = len(workload.backends) > 1
        self._streams = [CallStream(_call(backend, workload), clock, threads) for backend in workload.backends]
        for stream in self._streams:  # one after the other: together they would wait for one another
            stream.start(0, 1)()
        # Of the first stream alone: what it loaded or compiled, the others find done.
        self._first = self._take()[0]

    def warm_up(self, min_ns: int, min_runs: int) -> None:
        """Call without counting, until both limits are reached."""
        self._together(min_ns, min_runs)
        samples = self._take()
        self._warmups += len(samples)
        self._warmup_total += sum(samples)

    def run_round(self, pace_ms: float | None = None) -> None:
        """Measure for one turn: `ROUND_NS`, or less where that reaches both limits.

        Args:
            pace_ms: The machine's pace just before.
        """
        streams = len(self._streams)
        try:
            # Both limits, less what is measured already, shared among the streams; -(-a // b) rounds up.
            self._together(
                self._min_ns - self._total // streams, -(-(self._min_runs - len(self._samples)) // streams), ROUND_NS
            )
        finally:  # what an interrupted turn has measured counts as well
            samples = self._take()
            self._samples += samples
            self._total += sum(samples)
            if samples:
                self._rounds.append(len(samples))
                self._paces_ms += [] if pace_ms is None else [pace_ms]

    @property
    def has_samples(self) -> bool:
        """Whether any timed call has ended."""
        return bool(self._samples)

    @property
    def done(self) -> float:
        """Share of the measurement that is done; 1 when both limits are reached."""
        time_share = self._total / len(self._streams) / self._min_ns if self._min_ns else 1.0
        return min(1.0, time_share, len(self._samples) / self._min_runs)

    def timing(self) -> Timing:
        """The samples so far as a `Timing`."""
        return Timing(
            # Whole nanoseconds until here: sums of them are exact, however many there are.
            samples_ms=tuple((np.asarray(self._samples, np.int64) / 1e6).tolist()),
            batch=len(self._workload.x),
            transfers=self._workload.transfers,
            first_run_ms=self._first / 1e6,
            warmup_runs=self._warmups,
            warmup_seconds=self._warmup_total / 1e9,
            rounds=tuple(self._rounds),
            streams=len(self._streams),
            paces_ms=tuple(self._paces_ms),
            complete=self.done >= 1,
        )

    def close(self) -> None:
        """End the threads of the streams."""
        for stream in self._streams:
            stream.close()

    def _together(self, min_ns: int, min_runs: int, most_ns: int = sys.maxsize) -> None:
        for wait in [stream.start(min_ns, min_runs, most_ns) for stream in self._streams]:
            wait()

    def _take(self) -> list[int]:
        return list(chain.from_iterable(stream.take() for stream in self._streams))


class CallStream:
    """A caller: runs one loaded model again and again, in a thread of its own where there are several."""

    def __init__(self, call: Callable[[], object], clock: Clock, in_thread: bool) -> None:
        self._call, self._clock = call, clock
        self._samples: list[int] = []
        # The same thread throughout: backends keep what they bind for each thread.
        self._thread = ThreadPoolExecutor(1) if in_thread else None

    def start(self, min_ns: int, min_runs: int, most_ns: int = sys.maxsize) -> Callable[[], None]:
        """Call until both limits are reached, or the time is over; what is returned waits for that."""
        if self._thread is None:
            return partial(self._run, min_ns, min_runs, most_ns)
        return self._thread.submit(self._run, min_ns, min_runs, most_ns).result

    def take(self) -> list[int]:
        """Hand over the samples since the last call."""
        samples, self._samples = self._samples, []
        return samples

    def close(self) -> None:
        """End the stream's thread, after the turn it is in."""
        if self._thread is not None:
            self._thread.shutdown()

    def _run(self, min_ns: int, min_runs: int, most_ns: int) -> None:
        # Looked up once: the loop is part of what is measured, and some models take no longer than a few lines of it.
        call, clock, append = self._call, self._clock, self._samples.append
        total = runs = 0
        while total < most_ns and (total < min_ns or runs < min_runs):
            start = clock()
            call()
            sample = clock() - start
            append(sample)
            total += sample
            runs += 1


def _call(backend: Backend, workload: Workload) -> Callable[[], object]:
    return partial(backend.infer, workload.x) if workload.transfers else _resident(backend, workload.x)


def _resident(backend: Backend, x: Array) -> Callable[[], None]:
    enqueue = backend.prepare(x)
    synchronize = backend.synchronize

    def run() -> None:
        enqueue()
        synchronize()

    return run


class MeasurementInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a measurement, with the samples so far.

    Attributes:
        timings: Samples of the workloads that have any, by name; `complete` says which had reached their limits.
    """

    def __init__(self, timings: dict[str, Timing]) -> None:
        super().__init__("Interrupted.")
        self.timings = timings


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
    """Time one loaded model.

    Args:
        backend: The model.
        x: [N, ...], one batch.
        min_seconds: Time in timed calls, at least.
        min_runs: Number of timed calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
        clock: Nanoseconds.
        progress: Called with the model's name, and the share of its measurement that is done.

    Raises:
        UsageError: A limit is negative, or `x` does not fit the model.
        BackendError: A run failed.
    """
    limits = TimingLimits(
        min_seconds=min_seconds, min_runs=min_runs, warmup_seconds=warmup_seconds, warmup_runs=warmup_runs
    )
    workloads = {backend.name: Workload((backend,), x, transfers)}
    return measure_workloads(workloads, limits, clock=clock, progress=progress)[backend.name]


def measure_workloads(
    workloads: Mapping[str, Workload],
    limits: TimingLimits | None = None,
    *,
    clock: Clock = time.perf_counter_ns,
    pace: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time several workloads by turns of 0.1 s, so that the drift of a shared machine hits all alike.

    The order turns round after each round, and the first call after a change of model, or after the pace was taken, is
    not counted: it finds the caches full of something else.

    Args:
        workloads: Workloads by name.
        limits: How long each of them is timed.
        clock: Nanoseconds.
        pace: Called before each turn; gives how fast the machine itself is, in ms: a `pace.Pace`.
        progress: Called with each name, and the share of its measurement that is done.

    Raises:
        UsageError: An input does not fit its model.
        BackendError: A run failed.
        MeasurementInterrupted: Ctrl-C, once a sample was taken.
    """
    limits = limits or TimingLimits()
    runners: list[Runner] = []
    try:
        for name, workload in workloads.items():
            runners.append(Runner(name, workload, limits, clock))
        for runner in runners:
            runner.warm_up(int(limits.warmup_seconds * 1e9), limits.warmup_runs)
        pending = runners
        while pending:
            for runner in pending:
                # Before the turn and not within it: the pace runs on the cores that the model is about to use.
                pace_ms = None if pace is None else pace()
                # One model alone without a pace keeps its caches: there is nothing to warm up again.
                if len(runners) > 1 or pace is not None:
                    runner.warm_up(0, 1)
                runner.run_round(pace_ms)
                if progress is not None:
                    progress(runner.name, runner.done)
            # Reversed: else one model would always run right after the same other one, and pay for what that leaves in
            # the caches.
            pending = [runner for runner in reversed(pending) if runner.done < 1]
    except KeyboardInterrupt:
        timings = {runner.name: runner.timing() for runner in runners if runner.has_samples}
        if not timings:
            raise
        raise MeasurementInterrupted(timings) from None
    finally:
        for runner in runners:
            runner.close()
    return {runner.name: runner.timing() for runner in runners}

"""How long one call takes: wall time, every sample kept.

One sample is one call: `Backend.infer`, host to host, or one device-resident run and the wait for its end. The first
call is timed apart, because it pays for allocation and kernel choice; warm-up lasts for a time and a count, whichever
is later. Several streams are several callers at once, each with a loaded model of its own, as servers run them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rkd_deploy.errors import UsageError
from rkd_deploy.serve.backends.protocol import Array, Backend
from rkd_deploy.serve.bench.samples import Timing, interval_ranks
from rkd_deploy.serve.bench.turns import Clock, Runner, Subject

__all__ = [
    "Clock",
    "MeasurementInterrupted",
    "Progress",
    "Subject",
    "Timing",
    "interval_ranks",
    "measure",
    "measure_interleaved",
    "measure_subjects",
]

Progress = Callable[[str, float], None]
"""Called with a model's name and the share of its measurement that is done, 0 to 1."""


class MeasurementInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a measurement, with the samples so far.

    Attributes:
        timings: Of the subjects that have samples, by name; `complete` says which had reached their limits.
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
    """Time several models by turns, one caller each: see `measure_subjects`.

    Args:
        models: Backend and batch by name; the rest as for `measure`, and each limit holds for each model.
        min_seconds: Time in timed calls of each, at least.
        min_runs: Number of those calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
        clock: Nanoseconds.
        progress: Told how far each measurement is.

    Raises:
        UsageError: A limit is negative, or an input does not fit its model.
        BackendError: A run failed.
    """
    return measure_subjects(
        {name: Subject((backend,), x, transfers) for name, (backend, x) in models.items()},
        min_seconds=min_seconds,
        min_runs=min_runs,
        warmup_seconds=warmup_seconds,
        warmup_runs=warmup_runs,
        clock=clock,
        progress=progress,
    )


def measure_subjects(
    subjects: Mapping[str, Subject],
    *,
    min_seconds: float = 2.0,
    min_runs: int = 100,
    warmup_seconds: float = 0.5,
    warmup_runs: int = 10,
    clock: Clock = time.perf_counter_ns,
    pace: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time several subjects by turns of 0.1 s, so that the drift of a shared machine hits all alike.

    The order turns round after each round, and the first call after a change of model, or after the pace was taken, is
    not counted: it finds the caches full of something else.

    Args:
        subjects: By name; each limit holds for each of them.
        min_seconds: Time in timed calls of each stream, at least.
        min_runs: Number of timed calls of all streams, at least.
        warmup_seconds: Time in untimed calls before, at least.
        warmup_runs: Number of untimed calls before, at least.
        clock: Nanoseconds.
        pace: Asked before each turn how fast the machine itself is, in ms: a `pace.Pace`.
        progress: Told how far each measurement is.

    Raises:
        UsageError: A limit is negative, or an input does not fit its model.
        BackendError: A run failed.
        MeasurementInterrupted: Ctrl-C, once a sample was taken.
    """
    check_limits(min_seconds, min_runs, warmup_seconds, warmup_runs)
    runners: list[Runner] = []
    min_ns = int(min_seconds * 1e9)
    try:
        for name, subject in subjects.items():
            runners.append(Runner(name, subject, min_ns, min_runs, clock))
        for runner in runners:
            runner.warm_up(int(warmup_seconds * 1e9), warmup_runs)
        pending = runners
        while pending:
            for runner in pending:
                pace_ms = None if pace is None else pace()
                if len(runners) > 1 or pace is not None:
                    runner.warm_up(0, 1)
                runner.run_round(pace_ms)
                if progress is not None:
                    progress(runner.name, runner.done)
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


def check_limits(min_seconds: float, min_runs: int, warmup_seconds: float = 0.0, warmup_runs: int = 0) -> None:
    """Refuse limits that no measurement can have.

    Raises:
        UsageError: One is negative, or `min_runs` is below 1.
    """
    if min_seconds < 0 or warmup_seconds < 0 or warmup_runs < 0 or min_runs < 1:
        raise UsageError(
            f"min_seconds={min_seconds}, warmup_seconds={warmup_seconds}, warmup_runs={warmup_runs} and "
            f"min_runs={min_runs} were given; none may be negative, and min_runs must be at least 1."
        )

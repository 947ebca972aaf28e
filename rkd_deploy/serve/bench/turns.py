"""One turn after the other: what is timed under one name, its callers, and the samples so far."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from rkd_deploy.serve.backends.protocol import Array, Backend
from rkd_deploy.serve.bench.samples import Timing

Clock = Callable[[], int]
"""Nanoseconds since some fixed instant."""

ROUND_NS = 100_000_000
"""How long one model runs before the next one has its turn."""


@dataclass(frozen=True)
class Subject:
    """What is timed under one name.

    Attributes:
        backends: The loaded model; for several streams, one of its own for each.
        x: [N, ...], one batch.
        transfers: True times `infer`, host to host; False times device-resident runs (`prepare`).
    """

    backends: Sequence[Backend]
    x: Array
    transfers: bool = True


class Runner:
    """One subject under measurement: its callers, and the samples so far."""

    def __init__(self, name: str, subject: Subject, min_ns: int, min_runs: int, clock: Clock) -> None:
        self.name = name
        self._subject = subject
        self._min_ns, self._min_runs = min_ns, min_runs
        self._samples: list[int] = []
        self._rounds: list[int] = []
        self._paces_ms: list[float] = []
        self._total = 0
        self._warmups = 0
        self._warmup_total = 0
        threads = len(subject.backends) > 1
        self._callers = [Caller(_call(backend, subject), clock, threads) for backend in subject.backends]
        for caller in self._callers:  # one after the other: together they would wait for one another
            caller.start(0, 1)()
        self._first = self._take()[0]

    def warm_up(self, min_ns: int, min_runs: int) -> None:
        """Call without counting, until both limits are reached."""
        self._together(min_ns, min_runs)
        found = self._take()
        self._warmups += len(found)
        self._warmup_total += sum(found)

    def run_round(self, pace_ms: float | None = None) -> None:
        """One turn: `ROUND_NS`, or less where that reaches both limits.

        Args:
            pace_ms: The machine's pace just before.
        """
        streams = len(self._callers)
        try:
            self._together(
                self._min_ns - self._total // streams, -(-(self._min_runs - len(self._samples)) // streams), ROUND_NS
            )
        finally:  # what an interrupted turn has measured counts as well
            found = self._take()
            self._samples += found
            self._total += sum(found)
            if found:
                self._rounds.append(len(found))
                self._paces_ms += [] if pace_ms is None else [pace_ms]

    @property
    def has_samples(self) -> bool:
        """Whether any timed call has ended."""
        return bool(self._samples)

    @property
    def done(self) -> float:
        """Share of the measurement that is done; 1 when both limits are reached."""
        time_share = self._total / len(self._callers) / self._min_ns if self._min_ns else 1.0
        return min(1.0, time_share, len(self._samples) / self._min_runs)

    def timing(self) -> Timing:
        """The samples so far."""
        return Timing(
            samples_ms=tuple((np.asarray(self._samples, np.int64) / 1e6).tolist()),
            batch=len(self._subject.x),
            transfers=self._subject.transfers,
            first_run_ms=self._first / 1e6,
            warmup_runs=self._warmups,
            warmup_seconds=self._warmup_total / 1e9,
            rounds=tuple(self._rounds),
            streams=len(self._callers),
            paces_ms=tuple(self._paces_ms),
            complete=self.done >= 1,
        )

    def close(self) -> None:
        """End the callers' threads."""
        for caller in self._callers:
            caller.close()

    def _together(self, min_ns: int, min_runs: int, most_ns: int = sys.maxsize) -> None:
        for wait in [caller.start(min_ns, min_runs, most_ns) for caller in self._callers]:
            wait()

    def _take(self) -> list[int]:
        return list(chain.from_iterable(caller.take() for caller in self._callers))


class Caller:
    """One stream: calls one loaded model again and again, on a thread of its own where there are several."""

    def __init__(self, call: Callable[[], object], clock: Clock, own_thread: bool) -> None:
        self._call, self._clock = call, clock
        self._samples: list[int] = []
        # The same thread throughout: backends keep what they bind for each thread.
        self._thread = ThreadPoolExecutor(1) if own_thread else None

    def start(self, min_ns: int, min_runs: int, most_ns: int = sys.maxsize) -> Callable[[], None]:
        """Call until both limits are reached, or the time is over; what is returned waits for that."""
        if self._thread is None:
            return partial(self._run, min_ns, min_runs, most_ns)
        return self._thread.submit(self._run, min_ns, min_runs, most_ns).result

    def take(self) -> list[int]:
        """The samples since the last time this was asked."""
        taken, self._samples = self._samples, []
        return taken

    def close(self) -> None:
        """End its thread, after the turn it is in."""
        if self._thread is not None:
            self._thread.shutdown()

    def _run(self, min_ns: int, min_runs: int, most_ns: int) -> None:
        call, clock, append = self._call, self._clock, self._samples.append
        total = runs = 0
        while total < most_ns and (total < min_ns or runs < min_runs):
            start = clock()
            call()
            sample = clock() - start
            append(sample)
            total += sample
            runs += 1


def _call(backend: Backend, subject: Subject) -> Callable[[], object]:
    return partial(backend.infer, subject.x) if subject.transfers else _resident(backend, subject.x)


def _resident(backend: Backend, x: Array) -> Callable[[], None]:
    enqueue = backend.prepare(x)
    synchronize = backend.synchronize

    def run() -> None:
        enqueue()
        synchronize()

    return run

"""Timing against a clock that the tests turn: every number is known beforehand."""

import math
import os
import signal
import threading
from itertools import cycle

import numpy as np
import pytest

from rkd_deploy.backends import load_backend
from rkd_deploy.bench.timing import MeasurementInterrupted, TimingLimits, Workload, measure, measure_workloads
from rkd_deploy.errors import UsageError

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


@pytest.mark.parametrize("transfers", [True, False])
def test_first_call_warm_up_and_samples_are_kept_apart(transfers):
    clock = Clock()
    backend = Scripted(clock, [50, *[7] * 4, *[1, 2, 3, 4]])
    timing = measure(
        backend, X, min_seconds=0.01, min_runs=3, warmup_seconds=0, warmup_runs=4, transfers=transfers, clock=clock
    )
    assert timing.first_run_ms == 50
    assert (timing.warmup_runs, timing.warmup_seconds) == (4, 0.028)
    assert timing.samples_ms == (1, 2, 3, 4)
    assert timing.transfers is transfers
    assert timing.throughput_per_s == 4 * 4 / 0.010


@pytest.mark.parametrize(
    ("seconds", "runs", "expected"),
    [(0.010, 3, 10), (0.010, 15, 15), (0, 1, 1), (0.250, 1, 250)],
)
def test_limits_hold_by_time_and_by_count(seconds, runs, expected):
    clock = Clock()
    limits = {"min_seconds": seconds, "min_runs": runs, "warmup_seconds": seconds, "warmup_runs": runs}
    timing = measure(Scripted(clock, cycle([1])), X, clock=clock, **limits)
    assert len(timing.samples_ms) == expected
    assert timing.warmup_runs == expected


def test_models_take_turns_and_the_order_turns_round():
    clock, log = Clock(), []
    fast, slow = Scripted(clock, cycle([10]), log), Scripted(clock, cycle([30]), log)
    timings = measure_workloads(
        {"fast": Workload([fast], X), "slow": Workload([slow], X)},
        TimingLimits(min_seconds=0.3, min_runs=1, warmup_seconds=0, warmup_runs=1),
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
    assert timings["fast"].samples_ms == (10,) * 30
    assert timings["slow"].samples_ms == (30,) * 10
    assert timings["fast"].warmup_runs == 1 + 3


def test_drift_hits_interleaved_models_alike():
    clock = Clock()

    class Drifting(Scripted):
        def infer(self, x):
            clock.now += int((1 + clock.now / (2_000 * MS)) * MS)  # every machine time doubles within 2 s

    limits = {"min_seconds": 0, "min_runs": 500, "warmup_seconds": 0, "warmup_runs": 0}
    models = {name: Drifting(clock, []) for name in "ab"}
    apart = {name: measure(model, X, **limits, clock=clock).mean for name, model in models.items()}
    workloads = {name: Workload([model], X) for name, model in models.items()}
    timings = measure_workloads(workloads, TimingLimits(**limits), clock=clock)
    together = {name: timing.mean for name, timing in timings.items()}
    assert apart["b"] / apart["a"] > 1.2
    assert together["b"] / together["a"] == pytest.approx(1, abs=0.03)


def test_progress_is_told():
    clock, reports = Clock(), []
    measure(
        Scripted(clock, cycle([10])),
        X,
        min_seconds=0.25,
        min_runs=1,
        warmup_runs=0,
        warmup_seconds=0,
        clock=clock,
        progress=lambda name, share: reports.append((name, share)),
    )
    assert reports == [("scripted", 0.4), ("scripted", 0.8), ("scripted", 1.0)]


def test_a_real_backend_is_timed_both_ways(bundle, zoo):
    with load_backend("onnxruntime", bundle, threads=1) as backend:
        for transfers in (True, False):
            timing = measure(backend, zoo.pixels(2), min_seconds=0.02, warmup_seconds=0.01, transfers=transfers)
            assert len(timing.samples_ms) >= 100
            assert 0 < timing.p50 <= timing.percentile(90) <= timing.percentile(99) <= max(timing.samples_ms)


IMPOSSIBLE = [
    {"min_runs": 0},
    {"min_runs": 1.5},
    {"min_seconds": -1},
    {"min_seconds": math.nan},
    {"min_seconds": math.inf},
    {"warmup_seconds": -1},
    {"warmup_seconds": math.nan},
    {"warmup_runs": -1},
    {"warmup_runs": 10**400},
]


@pytest.mark.parametrize("limits", IMPOSSIBLE)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(UsageError, match=rf"{next(iter(limits))} .*must be .*between"):
        measure(Scripted(Clock(), []), X, **limits)


def test_both_ways_of_one_model_are_measured_in_turns():
    clock, log = Clock(), []
    backend = Scripted(clock, cycle([10]), log)
    timings = measure_workloads(
        {"host": Workload((backend,), X), "device": Workload((backend,), X, transfers=False)},
        TimingLimits(min_seconds=0.2, min_runs=1, warmup_seconds=0, warmup_runs=0),
        clock=clock,
    )
    assert [timing.transfers for timing in timings.values()] == [True, False]
    assert [len(timing.samples_ms) for timing in timings.values()] == [20, 20]
    assert all(timing.complete for timing in timings.values())


class Meeting:
    """A backend that, after its first run, answers only when as many callers are inside as there are streams."""

    name = "meeting"

    def __init__(self, barrier):
        self.barrier, self.calls, self.threads = barrier, 0, set()

    def infer(self, x):
        self.threads.add(threading.get_ident())
        self.calls += 1
        if self.calls > 1:
            self.barrier.wait(timeout=10)


def test_streams_call_at_once_each_on_its_own_model_and_thread():
    barrier = threading.Barrier(3)
    backends = [Meeting(barrier) for _ in range(3)]
    limits = TimingLimits(min_seconds=0, min_runs=9, warmup_seconds=0, warmup_runs=2)
    timing = measure_workloads({"m": Workload(backends, X)}, limits)["m"]
    assert [len(backend.threads) for backend in backends] == [1, 1, 1]
    assert len(set.union(*(backend.threads for backend in backends))) == 3
    assert (timing.streams, len(timing.samples_ms), timing.warmup_runs) == (3, 9, 6)
    total = sum(timing.samples_ms)
    assert timing.throughput_per_s == pytest.approx(3 * 4 * 9 / total * 1000)  # 3 callers, 4 images a call


def test_a_stream_that_fails_ends_the_measurement():
    class Failing(Meeting):
        def infer(self, x):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measure_workloads({"m": Workload([Failing(None), Failing(None)], X)}, TimingLimits(min_seconds=0, min_runs=1))


def test_an_interrupt_gives_the_samples_so_far():
    clock = Clock()

    class Interrupted(Scripted):
        def infer(self, x):
            super().infer(x)
            if self.calls == 16:  # the first run, and 15 of 30
                os.kill(os.getpid(), signal.SIGINT)

    models = {"slow": Interrupted(clock, cycle([10])), "next": Scripted(clock, cycle([10]))}
    workloads = {name: Workload([model], X) for name, model in models.items()}
    with pytest.raises(MeasurementInterrupted) as stop:
        measure_workloads(
            workloads, TimingLimits(min_seconds=0.3, min_runs=30, warmup_seconds=0, warmup_runs=0), clock=clock
        )
    slow, other = stop.value.timings["slow"], stop.value.timings["next"]
    # 10 a turn; a call after each change is not counted: 1 + 1 + 10, then B, then 1 + 3, of which the last is cut off.
    assert len(other.samples_ms) == 20
    assert 12 <= len(slow.samples_ms) <= 13
    assert not slow.complete
    assert not other.complete


def test_an_interrupt_before_any_sample_has_nothing_to_give():
    class Interrupted(Scripted):
        def infer(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        measure(Interrupted(Clock(), []), X)
    assert not isinstance(stop.value, MeasurementInterrupted)


def test_the_loop_adds_little_to_a_call():
    """The limit of benchmarks/bench_trust.py is 2 us; ten times that leaves room for a busy machine."""

    class Nothing:
        name = "nothing"

        def infer(self, x):
            return None

    assert measure(Nothing(), X, min_seconds=0.05, warmup_seconds=0).p50 < 0.02

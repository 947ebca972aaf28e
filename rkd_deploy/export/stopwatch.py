"""Times networks as they would be deployed, for latency budgets."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import nn

from rkd_deploy.backends import RunOn, check_backend
from rkd_deploy.bench.machine import provenance
from rkd_deploy.bench.sessions import SESSIONS, measure_in_sessions
from rkd_deploy.bench.statistics import Timing, judge
from rkd_deploy.bench.timing import TimingLimits, Workload, measure_workloads
from rkd_deploy.card import Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.separation.latency import Reading

TIMED_BACKENDS = ("onnxruntime", "onnxruntime:cuda-graphs", "openvino")
"""Backends that can time a candidate of a latency budget: those that run an ONNX file."""

_SEARCH = TimingLimits(min_seconds=0.5, min_runs=4, warmup_seconds=0.1, warmup_runs=2)
"""Limits of each network at each batch size while the search looks for widths."""
_CONFIRMATION = TimingLimits(
    min_seconds=2.5 / SESSIONS, min_runs=-(-10 // SESSIONS), warmup_seconds=0.3 / SESSIONS, warmup_runs=2
)  # -(-a // b) rounds up
"""Limits of each network at each batch size in each session of a confirmation."""


class ExportStopwatch:
    """Exports two classifiers and times them in turn: see `rkd_deploy.models.separation.latency.Stopwatch`.

    With one thread on a CPU it counts the time this process has the CPU: on an idle machine that is the latency, and on
    a busy one it leaves out the waiting for others. In all other cases it is wall time, which needs an idle machine.

    Args:
        run_on: Where; the backend is one of `TIMED_BACKENDS`.
        batches: Batch sizes; a candidate has to be fast at each.
        input_size: Height and width of the images in pixels.
        note: Told what is being done.

    Raises:
        MissingDependencyError: The backend is not installed.
    """

    def __init__(
        self,
        run_on: RunOn,
        batches: tuple[int, ...] = (1, 8),
        *,
        input_size: tuple[int, int],
        note: Callable[[str], None] | None = None,
    ) -> None:
        check_backend(run_on.backend)
        self._run_on, self._batches = run_on, batches
        self._is_cpu_time = run_on.threads == 1 and run_on.where == "cpu"
        self._preprocess = Preprocess(
            height=input_size[0], width=input_size[1], mean=(0.5,) * 3, std=(0.5,) * 3, embedded=False
        )
        self._note = note or (lambda text: None)
        self._folder = tempfile.TemporaryDirectory(prefix="rkd-latency-")
        self._files: dict[nn.Module, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def compare(self, candidate: nn.Module, s0: nn.Module, *, level: str, confirm: bool) -> Reading:
        """Time both in turn, batch size by batch size, in sessions of their own.

        Raises:
            UsageError: The candidate cannot be fused at this level.
        """
        files = {"s0": self._exported(s0, "tail"), "candidate": self._exported(candidate, level)}
        comparisons = {batch: self._compared(files, batch, confirm) for batch in self._batches}
        reading = Reading(
            ratios={batch: comparison.ratio for batch, comparison in comparisons.items()},
            intervals={
                batch: comparison.interval
                for batch, comparison in comparisons.items()
                if comparison.interval is not None
            },
            candidate_ms={
                batch: _median_ms(comparison.timings["candidate"]) for batch, comparison in comparisons.items()
            },
            s0_ms={batch: _median_ms(comparison.timings["s0"]) for batch, comparison in comparisons.items()},
            runs={
                batch: sum(len(timing.samples_ms) for timing in comparison.timings["candidate"])
                for batch, comparison in comparisons.items()
            },
        )
        ratios = ", ".join(f"{ratio:.3f} at batch {batch}" for batch, ratio in reading.ratios.items())
        how = f"{self._run_on.backend}, level {level}{', confirmed' if confirm else ''}"
        self._note(f"Latency over that of S0 on {how}: {ratios}")
        return reading

    def _compared(self, files: Mapping[str, Path], batch: int, confirm: bool) -> _Comparison:
        if confirm:
            sessions = measure_in_sessions(
                list(files), lambda names: self._timed({name: files[name] for name in names}, batch, _CONFIRMATION)
            )
            pairs = zip(sessions["candidate"], sessions["s0"], strict=True)
            judgement = judge([candidate.p50 / s0.p50 for candidate, s0 in pairs])
            return _Comparison(judgement.ratio, (judgement.low, judgement.high), sessions)
        # The search cannot afford sessions: it reads some twenty widths, and only has to find those worth confirming.
        # So one load must do, and the 10th percentiles: what else runs on a machine only ever adds to a latency.
        timings = self._timed(files, batch, _SEARCH)
        ratio = timings["candidate"].percentile(10) / timings["s0"].percentile(10)
        return _Comparison(ratio, None, {name: [timing] for name, timing in timings.items()})

    def _timed(self, files: Mapping[str, Path], batch: int, limits: TimingLimits) -> dict[str, Timing]:
        x = np.random.default_rng(0).standard_normal((batch, *self._preprocess.input_shape), dtype=np.float32)
        with ExitStack() as stack:
            return measure_workloads(
                {name: Workload((stack.enter_context(self._run_on.load(file)),), x) for name, file in files.items()},
                limits,
                # Of all threads of this process: with one thread it is the model's, with several it would add up what
                # runs side by side.
                clock=time.process_time_ns if self._is_cpu_time else time.perf_counter_ns,
            )

    def describe(self) -> dict[str, Any]:
        """Backend, device and machine."""
        facts, library = provenance(), self._run_on.backend.partition(":")[0]
        on_cpu = self._run_on.where == "cpu"
        return {
            "backend": self._run_on.backend,
            "version": facts.versions.get(library if on_cpu else f"{library}-gpu") or facts.versions.get(library),
            "device": self._run_on.where,
            **({} if on_cpu else {"gpu": facts.gpus[0]["name"] if facts.gpus else None}),
            "threads": self._run_on.threads,
            "clock": "CPU time of the process" if self._is_cpu_time else "wall time",
            "cpu": facts.cpu,
            "cores": facts.cores,
        }

    def _exported(self, network: nn.Module, level: str) -> Path:
        if network not in self._files:
            file = Path(self._folder.name) / f"{len(self._files)}.onnx"
            graph = ExportGraph(fuse(network.eval(), level), self._preprocess)
            file.write_bytes(to_onnx(graph, self._preprocess).SerializeToString())
            self._files[network] = file
        return self._files[network]


@dataclass(frozen=True)
class _Comparison:
    """A candidate against S0 at one batch size: the ratio, the judge's interval, and the timings by session."""

    ratio: float
    interval: tuple[float, float] | None
    timings: Mapping[str, Sequence[Timing]]


def _median_ms(timings: Sequence[Timing]) -> float:
    return median_low(timing.p50 for timing in timings)

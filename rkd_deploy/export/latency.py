"""Times networks against S0 as they would be deployed: fused, exported, run by a backend."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import nn

from rkd_deploy.card import Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.latency import Reading
from rkd_deploy.serve.backends import Backend, check_backend, load_backend
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.serve.bench.timing import Timing, interval_ranks, measure_interleaved

BACKENDS = ("onnxruntime", "openvino")
"""Those that run an ONNX file."""

_LIMITS = {
    False: {"min_seconds": 0.5, "min_runs": 4, "warmup_seconds": 0.1},
    True: {"min_seconds": 2.5, "min_runs": 10, "warmup_seconds": 0.3},
}
"""Of each network at each batch size; by whether it is to be confirmed."""


class ExportStopwatch:
    """Exports two classifiers and times them in turn: see `rkd_deploy.models.latency.Stopwatch`.

    With one thread on a CPU it counts the time this process has the CPU: on an idle machine that is the latency, and on
    a busy one it leaves out the waiting for others. In all other cases it is wall time, which needs an idle machine.

    Args:
        backend: One of `BACKENDS`.
        batches: Batch sizes; a candidate has to be fast at each.
        input_size: Height and width of the images in pixels.
        device: "cpu", "cuda" or "cuda:N".
        threads: Of the backend on a CPU. Default: its own choice.
        note: Told what is being done.

    Raises:
        UsageError: Unknown backend.
        MissingDependencyError: The backend is not installed.
    """

    def __init__(
        self,
        backend: str = "onnxruntime",
        batches: tuple[int, ...] = (1, 8),
        *,
        input_size: tuple[int, int],
        device: str = "cpu",
        threads: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        check_backend(backend)
        self._backend, self._batches, self._device, self._threads = backend, batches, device, threads
        self._is_cpu_time = threads == 1 and device == "cpu"
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

    def compare(self, candidate: nn.Module, given: nn.Module, *, level: str, confirm: bool) -> Reading:
        """Time both in turn, batch size by batch size, in sessions of their own.

        Raises:
            UsageError: The candidate cannot be fused at this level.
        """
        files = {"given": self._exported(given, "tail"), "candidate": self._exported(candidate, level)}
        reading = _reading({batch: self._timed(files, batch, confirm) for batch in self._batches}, confirm)
        told = ", ".join(f"{ratio:.3f} at batch {batch}" for batch, ratio in reading.ratios.items())
        how = f"{self._backend}, level {level}{', confirmed' if confirm else ''}"
        self._note(f"Latency over that of S0 on {how}: {told}")
        return reading

    def _timed(self, files: Mapping[str, Path], batch: int, confirm: bool) -> dict[str, Timing]:
        x = np.random.default_rng(0).standard_normal((batch, *self._preprocess.input_shape), dtype=np.float32)
        with ExitStack() as stack:
            return measure_interleaved(
                {name: (stack.enter_context(self._load(file)), x) for name, file in files.items()},
                warmup_runs=2,
                clock=time.process_time_ns if self._is_cpu_time else time.perf_counter_ns,
                **_LIMITS[confirm],  # type: ignore[arg-type]
            )

    def describe(self) -> dict[str, Any]:
        """Backend, device and machine."""
        facts = provenance()
        return {
            "backend": self._backend,
            "version": facts["versions"].get(self._backend),
            "device": self._device,
            "threads": self._threads,
            "clock": "CPU time of the process" if self._is_cpu_time else "wall time",
            "cpu": facts["cpu"],
            "cores": facts["cores"],
        }

    def _exported(self, network: nn.Module, level: str) -> Path:
        if network not in self._files:
            file = Path(self._folder.name) / f"{len(self._files)}.onnx"
            graph = ExportGraph(fuse(network.eval(), level), self._preprocess)
            file.write_bytes(to_onnx(graph, self._preprocess).SerializeToString())
            self._files[network] = file
        return self._files[network]

    def _load(self, file: Path) -> Backend:
        return load_backend(self._backend, file, device=self._device, threads=self._threads)


def _reading(timings: Mapping[int, Mapping[str, Timing]], confirm: bool) -> Reading:
    ratios, intervals = {}, {}
    for batch, timing in timings.items():
        if confirm:
            ratios[batch], intervals[batch] = paired_ratio(timing["candidate"], timing["given"])
        else:
            ratios[batch] = timing["candidate"].percentile(10) / timing["given"].percentile(10)
    return Reading(
        ratios=ratios,
        intervals=intervals,
        candidate_ms={batch: timing["candidate"].p50 for batch, timing in timings.items()},
        given_ms={batch: timing["given"].p50 for batch, timing in timings.items()},
        runs={batch: len(timing["candidate"].samples_ms) for batch, timing in timings.items()},
    )


def paired_ratio(first: Timing, second: Timing) -> tuple[float, tuple[float, float]]:
    """Ratio of the latencies of two networks that took turns, from each turn and the next one's of the other.

    What slows a machine down for longer than two turns slows both alike and cancels out; what hits a single turn is an
    outlier, which a median leaves out.

    Returns:
        The median of the turns' ratios, and its distribution-free 95 % interval (`Timing.interval`).
    """
    ratios = sorted(a / b for a, b in zip(first.round_medians_ms, second.round_medians_ms, strict=False))
    low, high = interval_ranks(len(ratios), 0.5, 0.95)
    return median(ratios), (
        -math.inf if low is None else ratios[low - 1],
        math.inf if high is None else ratios[high - 1],
    )

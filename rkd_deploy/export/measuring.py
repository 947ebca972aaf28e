"""Times networks against S0 as they would be deployed: fused, exported, run by a backend."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import nn

from rkd_deploy.backends import RunOn, check_backend
from rkd_deploy.bench import BenchSettings, Result, bench
from rkd_deploy.bench.machine import provenance
from rkd_deploy.bench.results import to_record
from rkd_deploy.bench.timing import Progress, Timing, interval_ranks, measure_interleaved
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import WideBranches, fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.latency import Reading

BACKENDS = ("onnxruntime", "openvino")
"""Those that run an ONNX file."""

_LIMITS = {
    False: {"min_seconds": 0.5, "min_runs": 4, "warmup_seconds": 0.1},
    True: {"min_seconds": 2.5, "min_runs": 10, "warmup_seconds": 0.3},
}
"""Of each network at each batch size; by whether it is to be confirmed."""


class ExportStopwatch:
    """Exports two classifiers and times them in turn: see `rkd_deploy.models.separation.latency.Stopwatch`.

    With one thread on a CPU it counts the time this process has the CPU: on an idle machine that is the latency, and on
    a busy one it leaves out the waiting for others. In all other cases it is wall time, which needs an idle machine.

    Args:
        run_on: Where; the backend is one of `BACKENDS`.
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
        reading = _reading({batch: self._timed(files, batch, confirm) for batch in self._batches}, confirm)
        told = ", ".join(f"{ratio:.3f} at batch {batch}" for batch, ratio in reading.ratios.items())
        how = f"{self._run_on.backend}, level {level}{', confirmed' if confirm else ''}"
        self._note(f"Latency over that of S0 on {how}: {told}")
        return reading

    def _timed(self, files: Mapping[str, Path], batch: int, confirm: bool) -> dict[str, Timing]:
        x = np.random.default_rng(0).standard_normal((batch, *self._preprocess.input_shape), dtype=np.float32)
        with ExitStack() as stack:
            return measure_interleaved(
                {name: (stack.enter_context(self._run_on.load(file)), x) for name, file in files.items()},
                warmup_runs=2,
                clock=time.process_time_ns if self._is_cpu_time else time.perf_counter_ns,
                **_LIMITS[confirm],  # type: ignore[arg-type]
            )

    def describe(self) -> dict[str, Any]:
        """Backend, device and machine."""
        facts = provenance()
        return {
            "backend": self._run_on.backend,
            "version": facts.versions.get(self._run_on.backend),
            "device": self._run_on.where,
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


def _reading(timings: Mapping[int, Mapping[str, Timing]], confirm: bool) -> Reading:
    ratios, intervals = {}, {}
    for batch, timing in timings.items():
        if confirm:
            ratios[batch], intervals[batch] = paired_ratio(timing["candidate"], timing["s0"])
        else:
            ratios[batch] = timing["candidate"].percentile(10) / timing["s0"].percentile(10)
    return Reading(
        ratios=ratios,
        intervals=intervals,
        candidate_ms={batch: timing["candidate"].p50 for batch, timing in timings.items()},
        s0_ms={batch: timing["s0"].p50 for batch, timing in timings.items()},
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


MARGIN = 0.02
"""How much faster than `tail` a level must be to take its place."""

Convert = Callable[[nn.Module], Any]
"""From a fused network to the ONNX model that would ship."""


@dataclass(frozen=True)
class Target:
    """Where and how level auto measures its candidates."""

    run_on: RunOn = field(default_factory=RunOn)
    batches: tuple[int, ...] = (1,)
    min_seconds: float = 1.0
    """Time in timed calls of each candidate at each batch size, at least."""


@dataclass(frozen=True)
class Choice:
    """The level that ships.

    Attributes:
        level: Its name.
        network: The fused network.
        proto: Its ONNX model, as `convert` made it.
        summary: For the card; empty where nothing was measured.
        record: The whole measurement, every sample; empty where nothing was measured.
    """

    level: str
    network: nn.Module
    proto: Any
    summary: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def choose_level(model: nn.Module, convert: Convert, target: Target, progress: Progress | None = None) -> Choice:
    """Build the candidates, measure them, keep the fastest.

    Args:
        model: As for `fuse`; of a network without assistants there is one candidate, which is not measured.
        convert: Makes an ONNX model of a fused network.
        target: Where it is meant to run.
        progress: Told what is measured, and how far it is.

    Raises:
        UsageError: A batch size below 1.
        BackendError: The backend cannot run here, or cannot run a candidate.
    """
    networks, refused = _candidates(model)
    protos = {level: convert(network) for level, network in networks.items()}
    if not isinstance(model, ResidualStudent):
        return Choice("tail", networks["tail"], protos["tail"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{level}.onnx" for level in protos]
        for file, proto in zip(files, protos.values(), strict=True):
            file.write_bytes(proto.SerializeToString())
        settings = BenchSettings(run_on=(target.run_on,), batches=target.batches, min_seconds=target.min_seconds)
        results = bench(files, settings, progress=progress)
    p50_ms = by_level(list(protos), results)
    level, ratios = fastest(p50_ms)
    summary = {
        "backend": target.run_on.backend,
        "device": results[0].device,
        "threads": target.run_on.threads,
        "batches": list(target.batches),
        "min_seconds": target.min_seconds,
        "p50_ms": p50_ms,
        "ratio_to_tail": ratios,
        "refused": refused,
        "chosen": level,
    }
    return Choice(level, networks[level], protos[level], summary, to_record(results, provenance(), summary))


def by_level(levels: Sequence[str], results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Medians in ms by level and batch size; results in the order of `bench`: each batch size, each level."""
    table: dict[str, dict[str, float]] = {level: {} for level in levels}
    for number, result in enumerate(results):
        table[levels[number % len(levels)]][str(result.batch)] = result.p50_ms
    return table


def fastest(p50_ms: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """The rule at the top of this file.

    Args:
        p50_ms: By level and batch size; `tail` among the levels.

    Returns:
        The level, and r of every level.
    """
    tail = p50_ms["tail"]
    ratios = {
        level: math.exp(sum(math.log(times[batch] / tail[batch]) for batch in tail) / len(tail))
        for level, times in p50_ms.items()
    }
    best = min(ratios, key=lambda level: ratios[level])
    return best if ratios[best] <= 1 - MARGIN else "tail", ratios


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks by level, and why a level is none."""
    networks, refused = {"tail": fuse(model, "tail")}, {}
    if isinstance(model, ResidualStudent):
        try:
            networks["wide"] = wide = fuse(model, "wide")
            if isinstance(wide, WideBranches) and wide.can_group:
                networks["wide-grouped"] = fuse(model, "wide-grouped")
        except UsageError as error:
            refused["wide"] = str(error)
    return networks, refused

"""Measures networks as they would be deployed, for latency budgets and for level auto."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import nn

from rkd_deploy.backends import RunOn, check_backend
from rkd_deploy.bench import BenchSettings, Result, bench
from rkd_deploy.bench.machine import Provenance, provenance
from rkd_deploy.bench.results import to_bench_record
from rkd_deploy.bench.sessions import SESSIONS, measure_in_sessions
from rkd_deploy.bench.statistics import Judgement, Timing, judge
from rkd_deploy.bench.timing import Progress, TimingLimits, Workload, measure_workloads
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import WideBranches, fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.latency import Reading

BACKENDS = ("onnxruntime", "onnxruntime:cuda-graphs", "openvino")
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


Convert = Callable[[nn.Module], Any]
"""From a fused network to the ONNX model that would ship."""


@dataclass(frozen=True)
class Target:
    """The place and the limits at which level auto measures its candidates."""

    run_on: RunOn = field(default_factory=RunOn)
    batches: tuple[int, ...] = (1,)
    min_seconds: float = 1.0
    """Time in timed calls of each candidate at each batch size, at least."""


@dataclass(frozen=True, kw_only=True)
class FusionSearch:
    """What level auto measured, and which level it chose by it.

    Attributes:
        target: Where and how long each candidate was measured.
        device: The device that the backend ran on.
        sessions: Results by level, session and batch size, every sample in them.
        judgements: Each level against `tail`.
        refused: Levels that the branches cannot be brought to, with the reason.
        chosen: The level that ships.
        provenance: The machine and the versions.
    """

    target: Target
    device: str
    sessions: Mapping[str, Sequence[Sequence[Result]]]
    judgements: Mapping[str, Judgement]
    refused: Mapping[str, str]
    chosen: str
    provenance: Provenance

    def to_summary(self) -> dict[str, Any]:
        """The search as the card has it: medians, ratios and intervals."""
        return {
            "backend": self.target.run_on.backend,
            "device": self.device,
            "threads": self.target.run_on.threads,
            "batches": list(self.target.batches),
            "min_seconds": self.target.min_seconds,
            "sessions": SESSIONS,
            "p50_ms": {level: _medians(each) for level, each in self.sessions.items()},
            "ratio_to_tail": {level: judgement.ratio for level, judgement in self.judgements.items()},
            "interval_of_ratio": {level: [each.low, each.high] for level, each in self.judgements.items()},
            "refused": dict(self.refused),
            "chosen": self.chosen,
        }

    def to_record(self) -> dict[str, Any]:
        """The search as fusion.json has it: a bench record of every sample, in the order of the measurements."""
        by_session = zip(*self.sessions.values(), strict=True)
        results = [result for session in by_session for level in session for result in level]
        return to_bench_record(results, self.provenance, self.to_summary())


@dataclass(frozen=True)
class Choice:
    """The level that ships.

    Attributes:
        level: Its name.
        network: The fused network.
        proto: Its ONNX model, as `convert` made it.
        search: The measurement that it was chosen by; None where nothing was measured.
    """

    level: str
    network: nn.Module
    proto: Any
    search: FusionSearch | None = None


def choose_level(model: nn.Module, convert: Convert, target: Target, progress: Progress | None = None) -> Choice:
    """Build the candidates, measure them side by side in repeated sessions, take the fastest.

    Candidates are `tail`, `wide`, and `wide-grouped` where it differs from `wide`. `sum` is none: it does all that
    `tail` does, and adapters and an addition besides. Each is exported as it would ship and run where it is meant to.
    The choice depends on the machine and on the moment: a bundle of level `auto` is only reproduced by naming the
    level that it chose.

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
        files = {level: Path(folder) / f"{level}.onnx" for level in protos}
        for level, proto in protos.items():
            files[level].write_bytes(proto.SerializeToString())
        sessions = _measured_levels(files, target, progress)
    judgements = judge_levels({level: [_p50_by_batch(results) for results in each] for level, each in sessions.items()})
    chosen = fastest_level(judgements)
    search = FusionSearch(
        target=target,
        device=sessions[chosen][0][0].device,
        sessions=sessions,
        judgements=judgements,
        refused=refused,
        chosen=chosen,
        provenance=provenance(),
    )
    return Choice(chosen, networks[chosen], protos[chosen], search)


def _measured_levels(
    files: Mapping[str, Path], target: Target, progress: Progress | None
) -> dict[str, list[list[Result]]]:
    """Results by level, session and batch size."""
    settings = BenchSettings(
        run_on=(target.run_on,),
        batches=target.batches,
        min_seconds=target.min_seconds / SESSIONS,
        min_runs=-(-BenchSettings.min_runs // SESSIONS),
        warmup_seconds=BenchSettings.warmup_seconds / SESSIONS,
    )

    def measure(levels: Sequence[str]) -> dict[str, list[Result]]:
        results = bench([files[level] for level in levels], settings)
        return {level: results[place :: len(levels)] for place, level in enumerate(levels)}

    return measure_in_sessions(list(files), measure, progress)


def _p50_by_batch(results: Sequence[Result]) -> dict[int, float]:
    return {result.batch: result.p50_ms for result in results}


def _medians(sessions: Sequence[Sequence[Result]]) -> dict[str, float]:
    """Median latency in ms by batch size, the median over the sessions."""
    return {
        str(results[0].batch): median_low(result.p50_ms for result in results)
        for results in zip(*sessions, strict=True)
    }


def judge_levels(p50_ms: Mapping[str, Sequence[Mapping[int, float]]]) -> dict[str, Judgement]:
    """Each level against `tail`, by sessions.

    In a session, the ratio of a level is the geometric mean over the batch sizes of its median over `tail`'s, so that
    every batch size counts alike whatever it takes.

    Args:
        p50_ms: Median latency by level, session and batch size; `tail` is among the levels.
    """
    return {
        level: judge([_ratio(times, tail) for times, tail in zip(sessions, p50_ms["tail"], strict=True)])
        for level, sessions in p50_ms.items()
    }


def _ratio(times: Mapping[int, float], tail: Mapping[int, float]) -> float:
    return math.exp(sum(math.log(times[batch] / tail[batch]) for batch in tail) / len(tail))


def fastest_level(judgements: Mapping[str, Judgement]) -> str:
    """The level of the least ratio among those that are faster than `tail` beyond chance; else `tail`, the simplest."""
    faster = {level: judgement.ratio for level, judgement in judgements.items() if judgement.verdict == "faster"}
    return min(faster, key=lambda level: faster[level], default="tail")


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks by level, and why a level is none."""
    networks, refused = {"tail": fuse(model, "tail")}, {}
    if isinstance(model, ResidualStudent):
        # A level that these branches cannot be brought to is no failure here: it is left out, and the card says why.
        try:
            networks["wide"] = wide = fuse(model, "wide")
            if isinstance(wide, WideBranches) and wide.can_group:
                networks["wide-grouped"] = fuse(model, "wide-grouped")
        except UsageError as error:
            refused["wide"] = str(error)
    return networks, refused

"""Chooses the fusion level that runs fastest, by measuring the files that would ship: level auto."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from torch import nn

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import BenchSettings, Result, bench
from rkd_deploy.bench.machine import Provenance, provenance
from rkd_deploy.bench.results import to_bench_record
from rkd_deploy.bench.sessions import SESSIONS, measure_in_sessions
from rkd_deploy.bench.statistics import Judgement, judge
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import WideBranches, fuse
from rkd_deploy.export.precision.options import AUTO, PrecisionOptions
from rkd_deploy.models.residual import ResidualStudent

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
        # Written as they would ship and loaded from disk: a session optimises a file when it is loaded, and that is
        # what differs between levels.
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


def target_of_files(target: Target | None, options: PrecisionOptions) -> Target:
    """What level auto measures files of lower precision on: what was asked for, else what the files are for.

    Raises:
        UsageError: They are for another runtime; or layers are kept by names, which other levels do not have.
    """
    target = target or Target(RunOn(options.runs_on[0]))
    if target.run_on.backend not in options.runs_on:
        raise UsageError(
            f"Level auto would measure on {target.run_on.backend} files that are written for --target {options.runtime}"
            f", which {' or '.join(options.runs_on)} is to run. Measure on that, on the machine it is for, or name a "
            "level."
        )
    if options.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(options.keep)} names layers of one fusion level, and level auto compares several. Name "
            "the level too, or use --keep auto."
        )
    return target

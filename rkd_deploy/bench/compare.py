"""Compares two models, side by side or by their records, and says whether one is slower.

    side by side   r_i = b_i / a_i, medians of session i, in which both were loaded afresh and timed by turns; the
                   judge of `statistics`
    recorded       median b / median a of two benches apart; the unit is a turn of 0.1 s (`timing`), whose samples share
                   a clock and neighbours and so are not independent. Each median has an interval of confidence
                   (1 + c) / 2, and [b_low / a_high, b_high / a_low] covers the ratio with confidence c (Bonferroni)

Two records are one session each, so their interval does not know that a model is not equally fast twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import bench
from rkd_deploy.bench.machine import Provenance
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.sessions import SESSIONS, measure_in_sessions
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.bench.statistics import Judgement, judge, median_interval
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import UsageError

_CONDITIONS = ("backend", "device", "batch", "threads", "transfers", "streams")


@dataclass(frozen=True, kw_only=True)
class Ratio(Judgement):
    """Latency of model B over that of model A under one condition; below 1, B is faster.

    Attributes:
        a: Name of model A.
        b: Name of model B.
        backend: Backend of both.
        device: Device of both.
        batch: Images in one call.
        threads: Number that was asked for.
        ratio: Median latency of B over that of A.
        low: Lower end of its confidence interval, 0 where there are too few sessions or turns for one.
        high: Upper end, infinite where there are too few sessions or turns.
        unit: What the interval rests on: ``"sessions"`` of both side by side, or ``"turns"`` of records.
        count: Number of sessions, or the smaller number of turns.
    """

    a: str
    b: str
    backend: str
    device: str
    batch: int
    threads: int | None
    unit: str
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The ratio for JSON; ends that do not exist are None."""
        ends = {"low": self.low or None, "high": self.high if math.isfinite(self.high) else None}
        return {**asdict(self), **ends, "verdict": self.verdict}


def measure_ratios(
    a: Path,
    b: Path,
    run_on: RunOn | None = None,
    *,
    batches: Sequence[int],
    min_seconds: float = 3.0,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> list[Ratio]:
    """Ratios of two models that are measured side by side now, in `SESSIONS` sessions.

    Args:
        a: Bundle or ONNX file.
        b: Bundle or ONNX file that is compared with A.
        run_on: Where. Default: ONNX Runtime on the CPU.
        batches: Images in one call; a ratio for each.
        min_seconds: Time in timed calls of each model at each batch size, over all sessions.
        confidence: Above 0 and below 1.
        progress: Called with the session, and the share that is done.

    Raises:
        RkdError: As `bench` raises it.
    """
    # Short sessions and many: what differs between two loads of a model is a session's, and more samples within one
    # would only make sure of it.
    settings = BenchSettings(
        run_on=(run_on or RunOn(),),
        batches=tuple(batches),
        min_seconds=min_seconds / SESSIONS,
        warmup_seconds=0.5 / SESSIONS,
    )
    models = {"a": a, "b": b}

    def measure(sides: Sequence[str]) -> Mapping[str, list[Result]]:
        results = bench([models[side] for side in sides], settings)
        return {side: results[place :: len(sides)] for place, side in enumerate(sides)}

    sessions = measure_in_sessions(list(models), measure, progress)
    return [
        _ratio_of_sessions(
            [session[place] for session in sessions["a"]], [session[place] for session in sessions["b"]], confidence
        )
        for place in range(len(batches))
    ]


def _ratio_of_sessions(a: Sequence[Result], b: Sequence[Result], confidence: float) -> Ratio:
    judgement = judge([second.p50_ms / first.p50_ms for first, second in zip(a, b, strict=True)], confidence)
    return _ratio(a[0], b[0], judgement, "sessions", len(a))


def _ratio(a: Result, b: Result, judgement: Judgement, unit: str, count: int) -> Ratio:
    return Ratio(
        a=a.model,
        b=b.model,
        backend=b.backend,
        device=b.device,
        batch=b.batch,
        threads=b.threads,
        ratio=judgement.ratio,
        low=judgement.low,
        high=judgement.high,
        unit=unit,
        count=count,
    )


def recorded_ratio(a_ms: Sequence[float], b_ms: Sequence[float], confidence: float = 0.95) -> Judgement:
    """Ratio of two models that were measured apart, with its confidence interval.

    Args:
        a_ms: Median latency of A in each turn.
        b_ms: Median latency of B in each turn.
        confidence: Above 0 and below 1.
    """
    # Bonferroni: two intervals of 1 - e / 2 each hold together with at least 1 - e, whatever ties them.
    each = (1 + confidence) / 2
    (a_low, a_high), (b_low, b_high) = (median_interval(medians, each) for medians in (a_ms, b_ms))
    # The farthest corners of both intervals: records know nothing of each other, so drift cancels nowhere.
    return Judgement(median_low(b_ms) / median_low(a_ms), b_low / a_high, b_high / a_low if a_low else math.inf)


def recorded_ratios(a: Sequence[Result], b: Sequence[Result], confidence: float = 0.95) -> list[Ratio]:
    """Ratios for every condition under which both of two records were measured.

    Args:
        a: Results of a bench.
        b: Results of the bench that is compared with it.
        confidence: Above 0 and below 1.

    Raises:
        UsageError: No condition in common, one under which a record holds several models, or results without turns.
    """
    ours, theirs = _by_condition(a), _by_condition(b)
    common = [condition for condition in ours if condition in theirs]
    if not common:
        raise UsageError(
            f"Nothing to compare: A was measured under {sorted(map(str, ours))} and B under {sorted(map(str, theirs))} "
            f"({', '.join(_CONDITIONS)}). Measure both under the same conditions."
        )
    return [_recorded(ours[condition], theirs[condition], confidence) for condition in common]


def _recorded(a: Result, b: Result, confidence: float) -> Ratio:
    judgement = recorded_ratio(a.round_medians_ms, b.round_medians_ms, confidence)
    return _ratio(a, b, judgement, "turns", min(len(a.round_medians_ms), len(b.round_medians_ms)))


def _by_condition(results: Sequence[Result]) -> dict[tuple[Any, ...], Result]:
    known: dict[tuple[Any, ...], Result] = {}
    for result in results:
        condition = tuple(getattr(result, name) for name in _CONDITIONS)
        if condition in known:
            raise UsageError(
                f"A record with several models ({known[condition].model}, {result.model}) does not say which one is "
                "meant. Compare records of one model each, or the models themselves: rkd-deploy bench-compare MODEL_A "
                "MODEL_B"
            )
        if not result.round_medians_ms:
            raise UsageError(
                f"The record of {result.model} holds no turns: it was written by another version of rkd-deploy, or "
                "without its samples. Measure again with rkd-deploy bench."
            )
        known[condition] = result
    return known


def differing_environment(a: Provenance, b: Provenance) -> list[str]:
    """Differences of two machines or the versions on them, a line each: a ratio across them is of these too."""
    machine = [name for name in ("cpu", "cores", "platform", "python") if getattr(a, name) != getattr(b, name)]
    packages = sorted(name for name in {*a.versions, *b.versions} if a.versions.get(name) != b.versions.get(name))
    return [f"{name}: {getattr(a, name)} and {getattr(b, name)}" for name in machine] + [
        f"{name}: {a.versions.get(name)} and {b.versions.get(name)}" for name in packages
    ]

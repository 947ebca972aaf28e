"""Which of two models is faster, and whether that can be said at all.

    side by side   r_i = b_i / a_i, medians of session i, in which both were loaded afresh and timed by turns; the
                   median of r_i, with its order-statistics interval
    recorded       median b / median a of two benches apart; the unit is a turn of 0.1 s (`timing`), whose samples share
                   a clock and neighbours and so are not independent. Each median has an interval of confidence
                   (1 + c) / 2, and [b_low / a_high, b_high / a_low] covers the ratio with confidence c (Bonferroni),
                   each low end first divided by the machine's slowdown at that time (`pace`)

Neither assumes a distribution. Sessions are the unit where they can be, because a model loaded twice is not equally
fast twice: where its memory comes to lie changes its latency, through the whole session. Two
records are one session each, so their interval does not know of that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import bench
from rkd_deploy.bench.results import RECORD_SCHEMA
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.bench.timing import Progress, interval_ranks
from rkd_deploy.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    pass

SESSIONS = 8
"""The fewest are 6 that bound a median on both sides with 95 % confidence."""
_CONDITIONS = ("backend", "device", "batch", "threads", "transfers")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Latency of B over that of A under one condition; below 1, B is faster.

    Attributes:
        a: Name of model A.
        b: Name of model B.
        backend: Of B, and so are device, batch and threads; A's are the same.
        device: What it ran on.
        batch: Images in one call.
        threads: As asked for.
        ratio: Median latency of B over that of A.
        low: Lower end of its confidence interval, 0 where there are too few turns for one.
        high: Upper end, infinite where there are too few turns.
        unit: What it rests on: ``"sessions"`` of both side by side, or ``"turns"`` of records.
        count: How many of them (of records: the smaller number).
        verdict: ``"faster"`` or ``"slower"`` when the interval excludes 1, else ``"not shown"``.
    """

    a: str
    b: str
    backend: str
    device: str
    batch: int
    threads: int | None
    ratio: float
    low: float
    high: float
    unit: str
    count: int

    @property
    def verdict(self) -> str:
        """What may be said of B."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "not shown"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ends that do not exist are None."""
        ends = {"low": self.low or None, "high": self.high if math.isfinite(self.high) else None}
        return {**asdict(self), **ends, "verdict": self.verdict}


def paired_ratio(a_ms: Sequence[float], b_ms: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Ratio of two models measured side by side, with its interval.

    Args:
        a_ms: Median latency of A in each session.
        b_ms: The same of B, in the same sessions.
        confidence: Above 0 and below 1.
    """
    ratios = sorted(b / a for a, b in zip(a_ms, b_ms, strict=True))
    low, high = _interval(ratios, confidence)
    return median_low(ratios), low, high


def recorded_ratio(
    a_ms: Sequence[float], b_ms: Sequence[float], slowdowns: tuple[float, float] = (1.0, 1.0), confidence: float = 0.95
) -> tuple[float, float, float]:
    """Ratio of two models measured apart, with its interval.

    Args:
        a_ms: Median latency of A in each turn.
        b_ms: The same of B.
        slowdowns: How much slower than it can be the machine was under A, and under B: so much less a model may take.
        confidence: Above 0 and below 1.
    """
    each = (1 + confidence) / 2
    (a_low, a_high), (b_low, b_high) = (_interval(sorted(values), each) for values in (a_ms, b_ms))
    low = b_low / slowdowns[1] / a_high
    high = b_high / (a_low / slowdowns[0]) if a_low else math.inf
    return median_low(b_ms) / median_low(a_ms), low, high


def _interval(ordered: Sequence[float], confidence: float) -> tuple[float, float]:
    """Of the median; 0 and infinity where so few values bound it on no side."""
    low, high = interval_ranks(len(ordered), 0.5, confidence)
    return (0.0 if low is None else ordered[low - 1], math.inf if high is None else ordered[high - 1])


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
    """Measure two models side by side, now, in `SESSIONS` sessions.

    Args:
        a: Bundle or ONNX file.
        b: The same, compared with A.
        run_on: Where. Default: ONNX Runtime on the CPU.
        batches: Images in one call; a ratio for each.
        min_seconds: Time in timed calls of each model at each batch size, over all sessions.
        confidence: Above 0 and below 1.
        progress: Told which session it is, and how far the measurement is.

    Raises:
        RkdError: As `bench` raises it.
    """
    settings = BenchSettings(
        run_on=(run_on or RunOn(),),
        batches=tuple(batches),
        min_seconds=min_seconds / SESSIONS,
        warmup_seconds=0.5 / SESSIONS,
    )
    medians: dict[int, tuple[list[float], list[float]]] = {batch: ([], []) for batch in batches}
    for session in range(SESSIONS):
        if progress is not None:
            progress(f"session {session + 1} of {SESSIONS}", session / SESSIONS)
        forward = session % 2 == 0  # who is loaded first, and so lies first in memory, must not always be the same
        results = bench([a, b] if forward else [b, a], settings)
        for one, other in zip(results[::2], results[1::2], strict=True):
            first, second = (one, other) if forward else (other, one)
            medians[first.batch][0].append(first.p50_ms)
            medians[first.batch][1].append(second.p50_ms)
    known = {"a": first.model, "b": second.model, "backend": second.backend, "device": second.device}
    ratios = {batch: paired_ratio(*both, confidence) for batch, both in medians.items()}
    return [
        Ratio(
            **known,
            batch=batch,
            threads=second.threads,
            ratio=ratio,
            low=low,
            high=high,
            unit="sessions",
            count=SESSIONS,
        )
        for batch, (ratio, low, high) in ratios.items()
    ]


def recorded_ratios(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], confidence: float = 0.95
) -> list[Ratio]:
    """A ratio for every condition under which two records were measured.

    Args:
        a: Results of a bench, as its JSON has them.
        b: The same of what A is compared with.
        confidence: Above 0 and below 1.

    Raises:
        UsageError: No condition in common, or one under which a record holds several models.
    """
    ours, theirs = _by_condition(a), _by_condition(b)
    common = [condition for condition in ours if condition in theirs]
    if not common:
        raise UsageError(
            f"Nothing to compare: A was measured under {sorted(map(str, ours))} and B under {sorted(map(str, theirs))} "
            f"({', '.join(_CONDITIONS)}, streams). Measure both under the same conditions."
        )
    return [_recorded(ours[condition], theirs[condition], confidence) for condition in common]


def _recorded(a: Mapping[str, Any], b: Mapping[str, Any], confidence: float) -> Ratio:
    slowdowns = (a.get("slowdown", 1.0), b.get("slowdown", 1.0))  # older records took no pace
    ratio, low, high = recorded_ratio(a["round_medians_ms"], b["round_medians_ms"], slowdowns, confidence)
    condition = {key: b[key] for key in ("backend", "device", "batch", "threads")}
    count = min(len(a["round_medians_ms"]), len(b["round_medians_ms"]))
    return Ratio(a=a["model"], b=b["model"], **condition, ratio=ratio, low=low, high=high, unit="turns", count=count)


def _by_condition(results: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    known: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for result in results:
        condition = (*(result[key] for key in _CONDITIONS), result.get("streams", 1))  # older records had one stream
        if condition in known:
            names = [known[condition]["model"], result["model"]]
            raise UsageError(
                f"A record with several models ({names[0]}, {names[1]}) does not say which one is meant. Compare "
                "records of one model each, or the models themselves: rkd-deploy bench-compare MODEL_A MODEL_B"
            )
        known[condition] = result
    return known


def read_record(path: Path) -> dict[str, Any]:
    """A bench.json.

    Raises:
        ModelFileError: It cannot be read, is none, or was written by a version that kept no turns.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        results = record["results"]
        known = record["kind"] == "bench" and record["schema"] <= RECORD_SCHEMA
        whole = known and all("round_medians_ms" in result for result in results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path} is no bench record ({error}). rkd-deploy bench writes one: bench.json."
        ) from error
    if not whole:
        raise ModelFileError(
            f"{path} was written by another version of rkd-deploy, or is another kind of record. Measure again with "
            "rkd-deploy bench."
        )
    assert isinstance(record, dict)
    return record


def differing_environment(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What the machines and versions of two records differ in, a line each: a ratio is of all of that, too."""
    machine = [key for key in ("cpu", "cores", "platform", "python") if a.get(key) != b.get(key)]
    ours, theirs = a.get("versions", {}), b.get("versions", {})
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in machine] + [
        f"{name}: {ours.get(name)} and {theirs.get(name)}" for name in names
    ]

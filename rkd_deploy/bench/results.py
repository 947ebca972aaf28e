"""What a bench found, for machines (JSON), for people (table, Markdown) and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from rkd_deploy.bench.statistics import Timing

if TYPE_CHECKING:
    pass

__all__ = [
    "RECORD_SCHEMA",
    "Figures",
    "Result",
    "to_record",
]

RECORD_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What follows from the samples of one measurement; a `_low_ms` and a `_high_ms` are the ends of the 95 %
    confidence interval, None where there are too few samples for one. The low end is divided by `slowdown`.
    """

    transfers: bool
    """True: host to host. False: input and output stayed on the device."""
    p50_ms: float
    p50_low_ms: float | None
    p50_high_ms: float | None
    p90_ms: float
    p90_low_ms: float | None
    p90_high_ms: float | None
    p95_ms: float
    p95_low_ms: float | None = None
    p95_high_ms: float | None = None
    p99_ms: float
    p99_low_ms: float | None = None
    p99_high_ms: float | None = None
    p99_9_ms: float | None = None
    p99_9_low_ms: float | None = None
    p99_9_high_ms: float | None = None
    mean_ms: float
    cv: float
    """Standard deviation over mean."""
    throughput_per_s: float
    """Images per second of callers that never wait: one for each stream."""
    first_run_ms: float
    runs: int
    warmup_runs: int
    warmup_seconds: float
    complete: bool = True
    """False: the measurement was interrupted, and these are the samples it had."""
    pace_ms: float | None = None
    """Time that a fixed piece of work took beside the turns (`pace.Pace`), their median; None: not taken."""
    slowdown: float = 1.0
    """That over the least it was ever seen to take on this machine: above 1, something else ran there."""
    round_medians_ms: list[float] = field(repr=False)
    """Median of each turn of 0.1 s: between turns the machine drifts, and within one it hardly does."""
    samples_ms: list[float] = field(repr=False)
    """All of them, in the order they were measured."""

    @staticmethod
    def of(timing: Timing, best_pace_ms: float | None = None) -> dict[str, Any]:
        """The fields above, by name; of the machine's fastest pace, the slowdown."""
        slowdown = timing.slowdown(best_pace_ms)
        values: dict[str, Any] = {}
        for q in (50, 90, 95, 99, 99.9):
            name = f"p{q:g}".replace(".", "_")
            low, high = (end if math.isfinite(end) else None for end in timing.interval(q))
            low = None if low is None else low / slowdown
            values |= {f"{name}_ms": timing.percentile(q), f"{name}_low_ms": low, f"{name}_high_ms": high}
        return values | {
            "transfers": timing.transfers,
            "mean_ms": timing.mean,
            "cv": timing.cv,
            "throughput_per_s": timing.throughput_per_s,
            "first_run_ms": timing.first_run_ms,
            "runs": len(timing.samples_ms),
            "warmup_runs": timing.warmup_runs,
            "warmup_seconds": timing.warmup_seconds,
            "complete": timing.complete,
            "pace_ms": median(timing.paces_ms) if timing.paces_ms else None,
            "slowdown": slowdown,
            "round_medians_ms": list(timing.round_medians_ms),
            "samples_ms": list(timing.samples_ms),
        }


@dataclass(frozen=True, kw_only=True)
class Result(Figures):
    """One model at one batch size on one backend; None where a fact is not known."""

    model: str
    part: str | None
    """Which network of the run: fused (S + A), student, s0, teacher."""
    fusion: str | None
    backend: str
    device: str
    batch: int
    threads: int | None
    """As asked for; None left it to the runtime."""
    streams: int = 1
    """Callers at once, each with the model loaded for itself."""
    precision: str
    accuracy: float | None
    """Top-1 in %: measured on this backend where `accuracy_images` says so, else the card's, on its test split."""
    accuracy_images: int | None = None
    """How many labelled images were run through this file on this backend; None: the accuracy is the card's."""
    parameters: int | None
    macs: int | None
    """Multiply-adds of one image."""
    file_bytes: int
    file_sha256: str | None = None
    """Of the file that was measured."""
    cuda_graph: bool | None = None
    """Whether runs are launches of a captured graph; None where the backend knows no such thing."""
    memory_limit_bytes: int | None = None
    """Most device memory that the runtime might take; None: no limit was set."""
    load_seconds: float | None = None
    """From the file to a model that can run, an engine's build left out; the mean of all streams."""
    build_seconds: float | None = None
    """What building the engine took, where it was built just now; no part of any other number."""
    engine_kept: str | None = None
    """The engine that ran, by its name in the cache of engines; None where none was needed, or one was given."""
    resident_load_bytes: int | None = None
    """By how much loading the model, for all streams, grew the resident memory of this process."""
    resident_peak_bytes: int | None = None
    """The most that this process held during the measurement, with all that was loaded beside the model."""
    resident_growth_bytes: int | None = None
    """That less what it held before any model was loaded."""
    device_growth_bytes: int | None = None
    """By how much the memory in use on the GPU, by any program, had grown since then at the end of the measurement;
    backends keep what they took, so it is their peak."""
    device_only: Figures | None = None
    """The same model with input and output left on the device, in turns with the figures above."""

    @classmethod
    def from_timing(
        cls, timing: Timing, *, device_only: Timing | None = None, best_pace_ms: float | None = None, **facts: Any
    ) -> Self:
        """Join the samples with the other fields.

        Args:
            timing: Of the figures.
            device_only: The same without transfers.
            best_pace_ms: The least that the machine's pace was ever seen to be.
            facts: The fields that do not follow from the samples.
        """
        resident = None if device_only is None else Figures(**Figures.of(device_only, best_pace_ms))
        return cls(
            **facts,
            **Figures.of(timing, best_pace_ms),
            batch=timing.batch,
            streams=timing.streams,
            device_only=resident,
        )


def to_record(
    results: Sequence[Result],
    provenance: Mapping[str, Any],
    settings: Mapping[str, Any],
    conditions: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """A benchmark record for JSON.

    Args:
        results: What `bench` gave.
        provenance: What `provenance.provenance` gave.
        settings: How it was measured: seconds, runs, warm-up, seed.
        conditions: ``before`` and ``after``: what `conditions.conditions` gave.
        partial: Whether the bench ended before all that was asked for was measured.
    """
    return {
        "schema": RECORD_SCHEMA,
        "kind": "bench",
        "partial": partial,
        "provenance": dict(provenance),
        "settings": dict(settings),
        "conditions": None if conditions is None else dict(conditions),
        "percentiles": "nearest rank; _low_ms and _high_ms bound the 95 % confidence interval (order statistics, with "
        "the design effect of turns of 0.1 s; the low end over the machine's slowdown)",
        "results": [asdict(result) for result in results],
    }

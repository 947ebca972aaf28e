"""Figures of one measurement, the facts around them, and how a record holds both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any, Self

from rkd_deploy.bench.machine import MachineState, Provenance
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.decoding import DecodingError, decode

__all__ = [
    "PERCENTILES",
    "RECORD_SCHEMA",
    "Figures",
    "Percentile",
    "Result",
    "result_of_row",
    "to_bench_record",
]

RECORD_SCHEMA = 1
PERCENTILES = (50, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Percentile:
    """A percentile of latency with its 95 % confidence interval.

    Attributes:
        ms: Nearest rank, always a sample that was measured.
        low_ms: Lower end of the interval; None where too few turns bound it.
        high_ms: Upper end of the interval; None where too few turns bound it.
    """

    ms: float
    low_ms: float | None = None
    high_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures that follow from the samples of one measurement.

    Attributes:
        transfers: True: host to host. False: input and output stayed on the device.
        percentiles: Percentiles by their q in %, of `PERCENTILES`; a record has `p50_ms`, `p50_low_ms` and so on.
        mean_ms: Arithmetic mean.
        cv: Standard deviation over mean.
        throughput_per_s: Images per second of callers that never wait, one for each stream.
        first_run_ms: Time of the first call, which is no sample.
        runs: Number of samples.
        warmup_runs: Number of untimed calls before.
        warmup_seconds: Time in them.
        complete: False where the measurement was interrupted; the figures are those of the samples until then.
        pace_ms: Time that a fixed piece of work took beside the turns (`pace.Pace`), their median; None: not taken.
        round_medians_ms: Median of each turn of 0.1 s, in order: the machine drifts between turns, hardly within one.
        samples_ms: Every sample, in the order they were measured.
    """

    transfers: bool
    percentiles: Mapping[float, Percentile]
    mean_ms: float
    cv: float
    throughput_per_s: float
    first_run_ms: float
    runs: int
    warmup_runs: int | None = None
    warmup_seconds: float | None = None
    complete: bool = True
    pace_ms: float | None = None
    round_medians_ms: Sequence[float] = field(default=(), repr=False)
    samples_ms: Sequence[float] = field(default=(), repr=False)

    @property
    def p50_ms(self) -> float:
        """Median latency in ms."""
        return self.percentiles[50].ms

    @staticmethod
    def of(timing: Timing) -> dict[str, Any]:
        """Values of `Figures`' fields by name, from the samples of a timing."""
        return {
            "transfers": timing.transfers,
            "percentiles": {q: _percentile(timing, q) for q in PERCENTILES},
            "mean_ms": timing.mean,
            "cv": timing.cv,
            "throughput_per_s": timing.throughput_per_s,
            "first_run_ms": timing.first_run_ms,
            "runs": len(timing.samples_ms),
            "warmup_runs": timing.warmup_runs,
            "warmup_seconds": timing.warmup_seconds,
            "complete": timing.complete,
            "pace_ms": median(timing.paces_ms) if timing.paces_ms else None,
            "round_medians_ms": list(timing.round_medians_ms),
            "samples_ms": list(timing.samples_ms),
        }

    def to_row(self) -> dict[str, Any]:
        """The figures as a record has them: a key for each end of each percentile's interval."""
        row: dict[str, Any] = {}
        for figure in fields(self):
            value = getattr(self, figure.name)
            if figure.name == "percentiles":
                for q, percentile in self.percentiles.items():
                    name = f"p{q:g}".replace(".", "_")
                    row |= {f"{name}_ms": percentile.ms, f"{name}_low_ms": percentile.low_ms}
                    row[f"{name}_high_ms"] = percentile.high_ms
            else:
                row[figure.name] = value.to_row() if isinstance(value, Figures) else value
        return row


def _percentile(timing: Timing, q: float) -> Percentile:
    low, high = (end if math.isfinite(end) else None for end in timing.interval(q))
    return Percentile(timing.percentile(q), low, high)


@dataclass(frozen=True, kw_only=True)
class Result(Figures):
    """One model at one batch size on one backend; None where a fact is not known.

    Attributes:
        model: Name of the model.
        part: Network of the run: fused (S + A), student, s0 or teacher.
        fusion: Fusion level.
        backend: Name of the backend.
        device: Device that it ran on.
        batch: Images in one call.
        threads: Number that was asked for; None left it to the runtime.
        streams: Callers at once, each with the model loaded for itself.
        precision: Precision that the backend reports.
        accuracy: Top-1 in % of the very file that was measured.
        accuracy_images: Number of labelled images that it was judged on.
        accuracy_source: ``"measured"`` on this backend, or ``"card"``: on the test split, when the file was exported.
        parameters: Number of parameters of the trained network, by the card.
        macs: Multiply-adds of one image in the trained network, by the card.
        graph_macs: Multiply-adds of one image in the exported graph, zeros included, by the card.
        graph_weights: Numbers that the exported graph stores, by the card.
        graph_zeros: Number of those that are zero.
        file_bytes: Size of the file that was measured.
        file_sha256: Checksum of that file.
        cuda_graph: Whether runs are launches of a captured graph; None where the backend has no such thing.
        memory_limit_bytes: Most device memory that the runtime might take; None: no limit was set.
        load_seconds: Time from the file to a model that can run, without an engine's build; the mean of all streams.
        build_seconds: Time to build the engine, where it was built just now; no part of any other number.
        engine_kept: Name of the engine in the cache of engines; None where none was needed, or one was given.
        resident_load_bytes: Growth of the process's resident memory by loading the model for all streams.
        resident_peak_bytes: Largest resident memory during the measurement, with all that was loaded beside the model.
        resident_growth_bytes: `resident_peak_bytes` less the resident memory before any model was loaded.
        device_growth_bytes: Growth of the memory in use on the GPU, by any program, from before any model was loaded
            to the end of the measurement; backends keep what they took, so it is their peak.
        device_only: Figures with input and output left on the device, in turns with the host-to-host ones.
    """

    model: str
    part: str | None = None
    fusion: str | None = None
    backend: str
    device: str
    batch: int
    threads: int | None = None
    streams: int = 1
    precision: str
    accuracy: float | None = None
    accuracy_images: int | None = None
    accuracy_source: str | None = None
    parameters: int | None = None
    macs: int | None = None
    graph_macs: int | None = None
    graph_weights: int | None = None
    graph_zeros: int | None = None
    file_bytes: int
    file_sha256: str | None = None
    cuda_graph: bool | None = None
    memory_limit_bytes: int | None = None
    load_seconds: float | None = None
    build_seconds: float | None = None
    engine_kept: str | None = None  # the names are the keys of bench.json, which earlier records have too
    resident_load_bytes: int | None = None
    resident_peak_bytes: int | None = None
    resident_growth_bytes: int | None = None
    device_growth_bytes: int | None = None
    device_only: Figures | None = None

    @classmethod
    def from_timing(cls, timing: Timing, *, device_only: Timing | None = None, **facts: Any) -> Self:
        """Make a result of samples and the fields that do not follow from them.

        Args:
            timing: Samples of the figures.
            device_only: Samples with input and output left on the device.
            facts: The fields that do not follow from the samples.
        """
        resident = None if device_only is None else Figures(**Figures.of(device_only))
        return cls(**facts, **Figures.of(timing), batch=timing.batch, streams=timing.streams, device_only=resident)


def result_of_row(row: Any, where: str = "results") -> Result:
    """A result from a row of a record, also of one that an older version wrote.

    Raises:
        DecodingError: The row is damaged.
    """
    if not isinstance(row, Mapping):
        raise DecodingError(f"{where} is no object")
    nested = row.get("device_only")
    with_percentiles = {**row, "percentiles": _percentiles(row, where)}
    if isinstance(nested, Mapping):
        with_percentiles["device_only"] = {**nested, "percentiles": _percentiles(nested, f"{where}.device_only")}
    return decode(Result, with_percentiles, where)


def _percentiles(row: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Percentiles of a record's row by q, from its keys `p50_ms`, `p50_low_ms` and so on."""
    names = [match[1] for key in row if (match := re.fullmatch(r"(p\d+(?:_\d+)?)_ms", str(key)))]
    if row.get("p50_ms") is None:
        raise DecodingError(f"{where}.p50_ms is missing")
    return {
        name[1:].replace("_", "."): {
            "ms": row[f"{name}_ms"],
            "low_ms": row.get(f"{name}_low_ms"),
            "high_ms": row.get(f"{name}_high_ms"),
        }
        for name in names
        if row[f"{name}_ms"] is not None
    }


def to_bench_record(
    results: Sequence[Result],
    provenance: Provenance,
    settings: Mapping[str, Any],
    conditions: tuple[MachineState, MachineState] | None = None,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """A bench as bench.json holds it.

    Args:
        results: What `bench` gave.
        provenance: What was run, when and where.
        settings: How it was measured: seconds, runs, warm-up, seed.
        conditions: The machine before the first and after the last measurement.
        partial: Whether the bench ended before all that was asked for was measured.
    """
    before, after = conditions or (None, None)
    return {
        "schema": RECORD_SCHEMA,
        "kind": "bench",
        "partial": partial,
        "provenance": asdict(provenance),
        "settings": dict(settings),
        "conditions": None if before is None or after is None else {"before": asdict(before), "after": asdict(after)},
        "percentiles": "nearest rank; _low_ms and _high_ms bound the 95 % confidence interval (order statistics, with "
        "the design effect of turns of 0.1 s)",
        "results": [result.to_row() for result in results],
    }

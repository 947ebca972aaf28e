"""What a bench found, for machines (JSON), for people (table, Markdown) and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from rkd_deploy.serve.bench import tabular
from rkd_deploy.serve.bench.tabular import Column, milliseconds
from rkd_deploy.serve.bench.timing import Timing

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["RECORD_SCHEMA", "Result", "markdown", "print_table", "to_record"]

RECORD_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Result:
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
    precision: str
    transfers: bool
    """True: host to host. False: input and output stayed on the device."""
    p50_ms: float
    p50_low_ms: float | None
    """Ends of the 95 % confidence interval; None where there are too few samples for one."""
    p50_high_ms: float | None
    p90_ms: float
    p90_low_ms: float | None
    p90_high_ms: float | None
    p95_ms: float
    p99_ms: float
    mean_ms: float
    cv: float
    """Standard deviation over mean."""
    throughput_per_s: float
    """Images per second of one caller."""
    first_run_ms: float
    runs: int
    warmup_runs: int
    warmup_seconds: float
    accuracy: float | None
    """Top-1 on the test split, in %."""
    parameters: int | None
    macs: int | None
    """Multiply-adds of one image."""
    file_bytes: int
    round_medians_ms: list[float] = field(repr=False)
    """Median of each turn of 0.1 s: what `rkd-deploy bench-compare` compares."""
    samples_ms: list[float] = field(repr=False)
    build_seconds: float | None = None
    """What building the engine took, where it was built just now; no part of any other number."""

    @classmethod
    def from_timing(cls, timing: Timing, **facts: Any) -> Self:
        """Join the samples with the other fields."""
        (p50_low, p50_high), (p90_low, p90_high) = (
            tuple(end if math.isfinite(end) else None for end in timing.interval(q)) for q in (50, 90)
        )
        return cls(
            **facts,
            batch=timing.batch,
            transfers=timing.transfers,
            p50_ms=timing.p50,
            p50_low_ms=p50_low,
            p50_high_ms=p50_high,
            p90_ms=timing.p90,
            p90_low_ms=p90_low,
            p90_high_ms=p90_high,
            p95_ms=timing.p95,
            p99_ms=timing.p99,
            mean_ms=timing.mean,
            cv=timing.cv,
            throughput_per_s=timing.throughput_per_s,
            first_run_ms=timing.first_run_ms,
            runs=len(timing.samples_ms),
            warmup_runs=timing.warmup_runs,
            warmup_seconds=timing.warmup_seconds,
            round_medians_ms=list(timing.round_medians_ms),
            samples_ms=list(timing.samples_ms),
        )


def to_record(results: Sequence[Result], provenance: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark record for JSON.

    Args:
        results: What `bench` gave.
        provenance: What `provenance.provenance` gave.
        settings: How it was measured: seconds, runs, warm-up, seed.
    """
    return {
        "schema": RECORD_SCHEMA,
        "kind": "bench",
        "provenance": dict(provenance),
        "settings": dict(settings),
        "percentiles": "nearest rank; _low_ms and _high_ms bound the 95 % confidence interval (order statistics)",
        "results": [asdict(result) for result in results],
    }


COLUMNS: tuple[Column[Result], ...] = (
    Column("Model", lambda r: r.model, numeric=False),
    Column("Part", lambda r: r.part, numeric=False, detail=True),
    Column("Fusion", lambda r: None if r.fusion in (None, "none") else r.fusion, numeric=False, detail=True),
    Column("Backend", lambda r: f"{r.backend} {r.device}", numeric=False, setting=True),
    Column("Precision", lambda r: None if r.precision == "unknown" else r.precision, numeric=False, setting=True),
    Column("Threads", lambda r: None if r.threads is None else str(r.threads), setting=True),
    Column("Batch", lambda r: str(r.batch), setting=True),
    Column("p50, ms", lambda r: milliseconds(r.p50_ms)),
    Column("its 95 % CI, ms", lambda r: _interval(r.p50_low_ms, r.p50_high_ms), detail=True),
    Column("p90, ms", lambda r: milliseconds(r.p90_ms)),
    Column("p99, ms", lambda r: milliseconds(r.p99_ms), detail=True),
    Column("Images/s", lambda r: f"{r.throughput_per_s:,.0f}"),
    Column("Top-1, %", lambda r: None if r.accuracy is None else f"{r.accuracy:.2f}"),
    Column("MACs, M", lambda r: None if r.macs is None else f"{r.macs / 1e6:,.1f}"),
    Column("Params, M", lambda r: None if r.parameters is None else f"{r.parameters / 1e6:,.3f}"),
    Column("Engine build, s", lambda r: None if r.build_seconds is None else f"{r.build_seconds:,.1f}"),
    Column("File, MB", lambda r: f"{r.file_bytes / 1e6:,.2f}"),
)


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table, units in its head; columns of which nothing is known are left out."""
    return tabular.markdown(COLUMNS, results)


def print_table(results: Sequence[Result], console: Console) -> None:
    """The same table for a terminal: what is equal in all rows stands once, above it; details where there is room."""
    tabular.print_table(COLUMNS, results, console)


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{milliseconds(low)} to {milliseconds(high)}"

"""Writes what is shown of records: tables as Markdown, the picture, the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.bench.loadgen import LABEL
from rkd_deploy.bench.reading import BenchRecord
from rkd_deploy.errors import DataError, MissingDependencyError
from rkd_deploy.report.accuracy_latency import write_plot
from rkd_deploy.report.columns import (
    PERCENTILE_COLUMNS,
    RESULT_COLUMNS,
    RUN_COLUMNS,
    SCENARIO_COLUMNS,
    machine_lines,
    rows_of,
)
from rkd_deploy.report.page import Pages, write_pages
from rkd_deploy.report.sections import environment, remark, sections
from rkd_deploy.report.style import distinct
from rkd_deploy.report.tables import markdown_table
from rkd_deploy.storage import write_text


def write_bench_report(records: Sequence[BenchRecord], folder: Path, name: str = "bench") -> Pages:
    """Write NAME.html and NAME.md of the results of some records, side by side.

    Args:
        records: From `read_bench`.
        folder: Made when it is not there.
        name: Name of both files, without the suffix.

    Raises:
        DataError: There is no result in them.
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    models = distinct(result.model for record in records for result in record.results)
    if not models:
        raise DataError(f"Nothing to report: {len(records)} records without a result. Measure with rkd-deploy bench.")
    title = f"Bench of {', '.join(models[:3])}{f' and {len(models) - 3} more' if len(models) > 3 else ''}"
    return write_pages(title, facts_of(records), sections(records), folder, name)


def facts_of(records: Sequence[BenchRecord]) -> dict[str, str]:
    """The facts at the top of a page: on what was measured, when, how many calls."""
    results = [result for record in records for result in record.results]
    where = distinct(f"{result.backend} on {result.device}" for result in results)
    calls = sum(len(result.samples_ms) for result in results)
    facts = {"Backend": ", ".join(where), "Timed calls": f"{calls:,}"} if results else {}
    environments = [environment(record) for record in records]
    for label, key in (("Processor", "cpu"), ("GPU", "GPU 0 name"), ("Measured, UTC", "time_utc")):
        values = distinct(str(known[key]) for known in environments if known.get(key) is not None)
        if values:
            facts[label] = ", ".join(values)
    remarks = distinct(remark(record) for record in records if record.partial)
    if remarks:
        facts["Partial"] = " ".join(remarks)
    return facts


@dataclass(frozen=True)
class Tables:
    """The files of a bench beside its record: tables and picture.

    Attributes:
        table: bench.md.
        plot: accuracy_latency.png, or None where nothing is known of accuracy or matplotlib is not installed.
    """

    table: Path
    plot: Path | None


def write_tables(record: BenchRecord, folder: Path) -> Tables:
    """Write bench.md and, where accuracies are known, accuracy_latency.png of a record.

    Args:
        record: From `read_bench`.
        folder: Made when it is not there; files of an earlier bench are replaced.

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    table = folder / "bench.md"
    write_text(table, bench_markdown(record))
    picture: Path | None = None
    if any(result.accuracy is not None for result in record.results):
        try:
            picture = folder / "accuracy_latency.png"
            write_plot(record.results, picture)
        except MissingDependencyError:  # an app's environment measures without drawing
            picture = None
    return Tables(table, picture)


def bench_markdown(record: BenchRecord) -> str:
    """The tables of a record as Markdown: results, percentiles, runs, scenarios, and the machine's state."""
    rows = rows_of(record.results)
    details = [markdown_table(PERCENTILE_COLUMNS, rows), markdown_table(RUN_COLUMNS, rows)]
    parts = ["Partial: the bench ended before all that was asked for was measured.\n"] if record.partial else []
    parts += [markdown_table(RESULT_COLUMNS, record.results), "\n".join(details)]
    if record.scenarios:
        scenarios = markdown_table(SCENARIO_COLUMNS, record.scenarios)
        parts.append(f"{LABEL}: shorter than MLPerf's 600 s, on noise, reviewed by nobody.\n\n{scenarios}")
    if lines := machine_lines(record):
        parts.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(parts)

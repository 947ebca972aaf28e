"""A comparison for machines (JSON) and people (terminal, Markdown)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.compare.plotting import plot
from rkd_deploy.compare.rows import Comparison, Row
from rkd_deploy.errors import MissingDependencyError
from rkd_deploy.serve.bench import tabular
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.serve.bench.tabular import Column, milliseconds
from rkd_deploy.storage import write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
NOTE = (
    "Top-1 is of the last epoch, on the test images, which nothing was chosen on. +- is the standard deviation over "
    "seeds where there are several, else (in brackets) the standard error that so many test images leave. Against S0: "
    "points above one network of the same cost in the same run. Against S: what A adds."
)


def _spread(row: Row) -> str:
    return f"({row.standard_error:.2f})" if row.deviation is None else f"{row.deviation:.2f}"


def _points(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"


COLUMNS: tuple[Column[Row], ...] = (
    Column("Network", lambda r: r.name, numeric=False),
    Column("Seeds", lambda r: str(len(r.runs)), setting=True),
    Column("Top-1, %", lambda r: f"{r.top1:.2f}"),
    Column("+-, points", _spread),
    Column("Against S0, points", lambda r: _points(r.over_s0)),
    Column("Against S, points", lambda r: _points(r.over_student)),
    Column("Held out, last, %", lambda r: None if r.val_last is None else f"{r.val_last:.2f}", detail=True),
    Column("Held out, best, %", lambda r: None if r.val_best is None else f"{r.val_best:.2f}", detail=True),
    Column("MACs, M", lambda r: f"{r.macs / 1e6:,.2f}"),
    Column("Params, M", lambda r: f"{r.parameters / 1e6:,.3f}", detail=True),
    Column("p50, ms", lambda r: None if r.p50_ms is None else milliseconds(r.p50_ms)),
    Column("p90, ms", lambda r: None if r.p90_ms is None else milliseconds(r.p90_ms), detail=True),
    Column("Training, s", lambda r: None if r.seconds is None else f"{r.seconds:,.0f}", detail=True),
)


@dataclass(frozen=True)
class Files:
    """Where a comparison was written to.

    Attributes:
        record: compare.json.
        table: compare.md.
        plot: compare.png, or None where matplotlib is not installed.
    """

    record: Path
    table: Path
    plot: Path | None


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The table, what it means, and what is missing in it."""
    console.print(f"{comparison.data}, {comparison.test_images:,} test images")
    tabular.print_table(COLUMNS, comparison.rows, console)
    console.print(NOTE, style="dim")
    for sentence in comparison.missing:
        console.print(f"Missing: {sentence}", style="yellow")


def markdown(comparison: Comparison) -> str:
    """The table and its notes as Markdown."""
    missing = "".join(f"\nMissing: {sentence}\n" for sentence in comparison.missing)
    head = f"{comparison.data}, {comparison.test_images:,} test images.\n\n"
    return head + tabular.markdown(COLUMNS, comparison.rows) + f"\n{NOTE}\n" + missing


def to_record(comparison: Comparison, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for JSON.

    Args:
        comparison: The rows.
        settings: How latency was measured.
    """
    return {
        "schema": SCHEMA,
        "kind": "compare",
        "data": comparison.data,
        "test_images": comparison.test_images,
        "rows": [asdict(row) for row in comparison.rows],
        "results": [asdict(result) for result in comparison.results],
        **comparison.study,
        "missing": list(comparison.missing),
        "settings": dict(settings),
    }


def write_comparison(comparison: Comparison, settings: Mapping[str, Any], folder: Path) -> Files:
    """Write compare.json, compare.md and compare.png into a folder.

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    record, table = folder / "compare.json", folder / "compare.md"
    write_json(record, {**to_record(comparison, settings), "provenance": provenance()})
    write_text(table, markdown(comparison))
    picture: Path | None = folder / "compare.png"
    try:
        plot(comparison, folder / "compare.png")
    except MissingDependencyError:
        picture = None
    return Files(record, table, picture)

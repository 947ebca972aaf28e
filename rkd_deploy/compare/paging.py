"""A comparison as a page: its own table and picture first, then all that a bench tells of the same networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_deploy.compare.plotting import draw
from rkd_deploy.compare.report import COLUMNS, NOTE
from rkd_deploy.compare.rows import Comparison, Row
from rkd_deploy.errors import ModelFileError
from rkd_deploy.serve.reporting.document import Picture, Section, table_of
from rkd_deploy.serve.reporting.page import Pages, write_pages
from rkd_deploy.serve.reporting.records import gather
from rkd_deploy.serve.reporting.sections import sections
from rkd_deploy.serve.reporting.writing import facts_of


def write_comparison_report(record: Mapping[str, Any], folder: Path) -> Pages:
    """Write compare.html and compare.md from what compare.json holds.

    Args:
        record: Its content.
        folder: Made when it is not there.

    Raises:
        ModelFileError: The record lacks something.
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    comparison, material = _from_record(record), gather([record])
    facts = {"Data": comparison.data, "Test images": f"{comparison.test_images:,}", **facts_of(material)}
    title = f"Comparison of {len(comparison.rows)} networks on {comparison.data}"
    found = [_section(comparison), *sections(material)]
    return write_pages(title, facts, found, folder, "compare")


def _section(comparison: Comparison) -> Section:
    best = max(comparison.rows, key=lambda row: row.top1)
    words = f"Most accurate: {best.name}, {best.top1:.2f} % of the test images."
    picture = Picture("Accuracy, cost, latency", words, draw(comparison, narrow=True))
    table = table_of("Networks", COLUMNS, comparison.rows)
    return Section("Networks", [NOTE, *(f"Missing: {one}" for one in comparison.missing)], [table, picture])


def _from_record(record: Mapping[str, Any]) -> Comparison:
    try:
        rows = tuple(Row(**{**row, "runs": tuple(row["runs"])}) for row in record["rows"])
        data, images = record["data"], record["test_images"]
    except (KeyError, TypeError) as error:
        raise ModelFileError(
            f"The record of a comparison lacks something or has too much ({error}). Compare the runs again."
        ) from error
    return Comparison(data=data, test_images=images, rows=rows, networks=(), missing=tuple(record.get("missing", ())))

"""The report of a bench: from its record, now or later, or from those of several benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkd_deploy.errors import DataError
from rkd_deploy.serve.bench.canvas import distinct
from rkd_deploy.serve.reporting.page import Pages, write_pages
from rkd_deploy.serve.reporting.records import Material, gather
from rkd_deploy.serve.reporting.sections import sections


def write_bench_report(records: Sequence[Mapping[str, Any]], folder: Path, name: str = "bench") -> Pages:
    """Write NAME.html and NAME.md of the results of some records, side by side.

    Args:
        records: Contents of bench.json files.
        folder: Made when it is not there.
        name: Of both files.

    Raises:
        DataError: There is no result in them.
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    material = gather(records)
    if not material.results:
        raise DataError(f"Nothing to report: {len(records)} records without a result. Measure with rkd-deploy bench.")
    models = distinct(result.model for result in material.results)
    title = f"Bench of {', '.join(models[:3])}{f' and {len(models) - 3} more' if len(models) > 3 else ''}"
    return write_pages(title, facts_of(material), sections(material), folder, name)


def facts_of(material: Material) -> dict[str, str]:
    """What everybody asks first: on what, when, how often."""
    where = distinct(f"{result.backend} on {result.device}" for result in material.results)
    calls = sum(len(result.samples_ms) for result in material.results)
    facts = {"Backend": ", ".join(where), "Timed calls": f"{calls:,}"} if material.results else {}
    for label, key in (("Processor", "cpu"), ("GPU", "GPU 0 name"), ("Measured, UTC", "time_utc")):
        found = distinct(str(one[key]) for one in material.environments if one.get(key) is not None)
        if found:
            facts[label] = ", ".join(found)
    if material.remarks:
        facts["Partial"] = " ".join(distinct(material.remarks))
    return facts

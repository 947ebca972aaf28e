"""The report of a bench: from its record, now or later, or from those of several benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.bench.loadgen import ScenarioResult
from rkd_deploy.bench.machine import describe, provenance
from rkd_deploy.bench.results import Result, to_record
from rkd_deploy.errors import DataError, MissingDependencyError
from rkd_deploy.report.accuracy_latency import plot
from rkd_deploy.report.columns import details_markdown, results_markdown, scenarios_markdown
from rkd_deploy.report.page import Pages, write_pages
from rkd_deploy.report.reading import Material, gather
from rkd_deploy.report.sections import sections
from rkd_deploy.report.style import distinct
from rkd_deploy.storage import write_json, write_text


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


@dataclass(frozen=True)
class Report:
    """Where a bench was written to.

    Attributes:
        record: bench.json, with every sample.
        table: bench.md.
        plot: accuracy_latency.png, or None where nothing is known of accuracy or matplotlib is not installed.
    """

    record: Path
    table: Path
    plot: Path | None


def write_report(
    results: Sequence[Result],
    settings: Mapping[str, Any],
    folder: Path,
    states: Mapping[str, Any] | None = None,
    scenarios: Sequence[ScenarioResult] = (),
    *,
    more: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Report:
    """Write a bench into a folder; what an earlier bench left there is replaced, file by file.

    Args:
        results: What `bench` gave.
        settings: How it was measured.
        folder: Made when it is not there.
        states: ``before`` and ``after``: the machine's `conditions`.
        scenarios: What LoadGen found.
        more: What else belongs into the record: "roofline" and "layers".
        partial: Whether less was measured than was asked for.

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    record, table = folder / "bench.json", folder / "bench.md"
    content = to_record(results, provenance(), settings, states, partial=partial)
    write_json(record, {**content, "loadgen": [asdict(scenario) for scenario in scenarios], **(more or {})})
    write_text(table, _page(results, states, scenarios, partial))
    picture: Path | None = None
    if any(result.accuracy is not None for result in results):
        try:
            picture = folder / "accuracy_latency.png"
            plot(results, picture)
        except MissingDependencyError:  # an app's environment measures without drawing
            picture = None
    return Report(record, table, picture)


def _page(
    results: Sequence[Result],
    states: Mapping[str, Any] | None,
    scenarios: Sequence[ScenarioResult],
    partial: bool,
) -> str:
    parts = ["Partial: the bench ended before all that was asked for was measured.\n"] if partial else []
    parts += [results_markdown(results), details_markdown(results)]
    if scenarios:
        parts.append(scenarios_markdown(scenarios))
    if states is not None:
        parts.append("".join(f"- {line}\n" for line in describe(**states)))
    return "\n".join(parts)

"""A bench on disk: the record for machines, the table and the plot for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.errors import MissingDependencyError
from rkd_deploy.serve.bench.plotting import plot
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.serve.bench.report import Result, markdown, to_record
from rkd_deploy.storage import write_json, write_text


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
    results: Sequence[Result], settings: Mapping[str, Any], folder: Path, more: Mapping[str, Any] | None = None
) -> Report:
    """Write a bench into a folder; what an earlier bench left there is replaced, file by file.

    Args:
        results: What `bench` gave.
        settings: How it was measured.
        folder: Made when it is not there.
        more: What else belongs into the record: "roofline" and "layers".

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    record, table = folder / "bench.json", folder / "bench.md"
    write_json(record, {**to_record(results, provenance(), settings), **(more or {})})
    write_text(table, markdown(results))
    picture: Path | None = None
    if any(result.accuracy is not None for result in results):
        try:
            picture = folder / "accuracy_latency.png"
            plot(results, picture)
        except MissingDependencyError:  # an app's environment measures without drawing
            picture = None
    return Report(record, table, picture)

"""A bench on disk: the record for machines, the table and the plot for people."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.errors import InterruptedBench, MissingDependencyError, RkdError
from rkd_deploy.serve.bench import bench
from rkd_deploy.serve.bench.conditions import conditions, describe
from rkd_deploy.serve.bench.plotting import plot
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.serve.bench.report import Result, details_markdown, markdown, to_record
from rkd_deploy.serve.bench.timing import Progress
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
    results: Sequence[Result],
    settings: Mapping[str, Any],
    folder: Path,
    states: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
) -> Report:
    """Write a bench into a folder; what an earlier bench left there is replaced, file by file.

    Args:
        results: What `bench` gave.
        settings: How it was measured.
        folder: Made when it is not there.
        states: ``before`` and ``after``: the machine's `conditions`.
        partial: Whether less was measured than was asked for.

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    record, table = folder / "bench.json", folder / "bench.md"
    write_json(record, to_record(results, provenance(), settings, states, partial=partial))
    write_text(table, _page(results, states, partial))
    picture: Path | None = None
    if any(result.accuracy is not None for result in results):
        try:
            picture = folder / "accuracy_latency.png"
            plot(results, picture)
        except MissingDependencyError:  # an app's environment measures without drawing
            picture = None
    return Report(record, table, picture)


@dataclass(frozen=True)
class Recorded:
    """A bench that is over: what it found, in which state of the machine, and where it was written."""

    results: list[Result]
    report: Report
    conditions: list[str]
    """The machine before and after, as lines for people."""


def record_bench(
    models: Sequence[str | os.PathLike[str]],
    settings: Mapping[str, Any],
    folder: Path,
    progress: Progress | None = None,
) -> Recorded:
    """Run `bench` and write it down, as far as it came.

    Args:
        models: As for `bench`.
        settings: Its other arguments.
        folder: As for `write_report`.
        progress: As for `bench`.

    Raises:
        InterruptedBench: Ctrl-C; what was measured by then is written, marked as partial.
        RkdError: As `bench` raises it, with what was measured before written in the same way.
        KeyboardInterrupt: Ctrl-C before anything was measured; nothing is written.
    """
    results: list[Result] = []
    before = conditions()

    def write(partial: bool) -> Recorded:
        states = {"before": before, "after": conditions()}
        named = {key: value.name if isinstance(value, Path) else value for key, value in settings.items()}
        report = write_report(results, named, folder, states, partial=partial)
        return Recorded(results, report, describe(**states))

    try:
        bench(models, **settings, progress=progress, on_result=results.append)
    except (KeyboardInterrupt, RkdError) as error:
        if not results:
            raise
        kept = f"{len(results)} results measured before are in {write(partial=True).report.record}, marked as partial."
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedBench(f"Interrupted. The {kept} Run the command again for the rest.") from None
        error.add_note(kept)
        raise
    return write(partial=False)


def _page(results: Sequence[Result], states: Mapping[str, Any] | None, partial: bool) -> str:
    parts = ["Partial: the bench ended before all that was asked for was measured.\n"] if partial else []
    parts += [markdown(results), details_markdown(results)]
    if states is not None:
        parts.append("".join(f"- {line}\n" for line in describe(**states)))
    return "\n".join(parts)

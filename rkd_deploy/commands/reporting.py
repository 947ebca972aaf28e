"""A report from what was recorded, without measuring again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rkd_deploy.commands.options import Json, console_for, emit, need
from rkd_deploy.errors import UsageError


def report(
    records: Annotated[list[Path], typer.Argument(help="bench.json files, or one compare.json.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the page. Default: that of the first record.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a page of records.

    Self-contained HTML and Markdown; several benches, of several machines say, side by side.
    """
    need("train", "matplotlib")
    from rkd_deploy.serve.bench.display import status
    from rkd_deploy.serve.reporting.records import read_records
    from rkd_deploy.serve.reporting.writing import write_bench_report

    found = read_records(records)
    folder = output or records[0].parent
    kinds = {record["kind"] for record in found}
    if kinds == {"compare"} and len(found) == 1:
        need("train", "torch", "safetensors")
        from rkd_deploy.compare import write_comparison_report

        with status("Drawing"):
            pages = write_comparison_report(found[0], folder)
    elif kinds == {"bench"}:
        with status("Drawing"):
            pages = write_bench_report(found, folder)
    else:
        raise UsageError(
            f"{len(found)} records of the kinds {', '.join(sorted(kinds))}: give bench.json files, or one compare.json."
        )
    console_for(as_json).print(f"Report {pages.page}")
    if as_json:
        emit({"report": str(pages.page), "markdown": str(pages.markdown)})


def report_folder(report: Path | None, output: Path | None) -> Path | None:
    """The folder that --report or --output names, None where neither does; what a report needs is asked for."""
    if report is None:
        return output
    if output is not None:
        raise UsageError(
            f"--report {report} and --output {output}: the page stands beside the record. Give --report alone."
        )
    need("train", "matplotlib")
    return report

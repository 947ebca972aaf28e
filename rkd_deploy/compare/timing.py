"""Exports the networks of a comparison and times them in turn."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from rkd_deploy.backends import RunOn, describe_model
from rkd_deploy.bench import BenchSettings, Result, bench
from rkd_deploy.bench.roofline import Analysis
from rkd_deploy.bench.timing import Progress
from rkd_deploy.compare.exits import ExitCurve, exit_curve
from rkd_deploy.compare.rows import Comparison, NetworkRow
from rkd_deploy.errors import UsageError
from rkd_deploy.pipeline import export_run


def timed(
    comparison: Comparison,
    settings: BenchSettings | None = None,
    *,
    studied: bool = False,
    early_exit: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure latencies, and add them to a comparison.

    Each row's network (that of the first seed) is exported into a temporary folder and proven on random images; what
    ships is exported, and proven on the test images, by `export_run`.

    Args:
        comparison: From `compare_runs`.
        settings: One place to run and the batch sizes, of which the rows have the first. Default: ONNX Runtime on the
            CPU, single images, 1 s for each network.
        studied: Whether the roofline and the time of each layer are wanted too.
        early_exit: Whether S + A are measured leaving early too, image by image: the test images are classified again.
        progress: Told what is being exported or measured, and how far it is.

    Raises:
        GateError: An exported graph does not do what the network does.
        BackendError: The backend cannot run here.
        UsageError: Early exit was asked for on PyTorch, which has no program of its graphs.
    """
    settings = settings or BenchSettings(batches=(1,), min_seconds=1.0)
    (run_on,), batches = settings.run_on, settings.batches or (1,)
    if early_exit and run_on.backend.startswith("pytorch"):
        raise UsageError(f"Early exit is timed on ONNX files, which {run_on.backend} does not run. Name a runtime.")
    with tempfile.TemporaryDirectory(prefix="rkd-compare-") as folder:
        bundles, left_out = _exported(comparison, Path(folder), run_on, early_exit, progress)
        analysis = Analysis(bundles, [run_on], batches, names=[row.name for row in comparison.rows])
        if studied:
            analysis.predict(progress)
        results = bench(bundles, settings, progress=progress)
        exits = tuple(_exits(comparison.rows, bundles, settings, progress)) if early_exit else ()
        if studied:
            analysis.profile(progress)
    # A bench gives its results batch size by batch size, within each in the order of the models.
    results = [
        dataclasses.replace(result, model=row.name, part=row.part, accuracy=row.top1)
        for result, row in zip(results, comparison.rows * len(batches), strict=True)
    ]
    rows = tuple(
        _timed_row(row, result)
        for row, result in zip(comparison.rows, results, strict=False)  # those of the first batch size
    )
    medians = {row.name: row.p50_ms for row in rows}
    verdicts = tuple(
        dataclasses.replace(verdict, time_ratio=_ratio(medians[verdict.network], medians[verdict.control_name]))
        for verdict in comparison.verdicts
    )
    return dataclasses.replace(
        comparison,
        rows=rows,
        results=tuple(results),
        settings=settings,
        roofline=analysis.roofline,
        layers=None if analysis.layers is None else tuple(analysis.layers),
        verdicts=verdicts,
        exits=exits,
        missing=(*comparison.missing, *left_out),
    )


def _exported(
    comparison: Comparison, folder: Path, run_on: RunOn, early_exit: bool, progress: Progress | None
) -> tuple[list[Path], list[str]]:
    """A bundle of each row's network, and a sentence for each S + A that cannot leave early."""
    bundles, left_out = [], []
    for number, (row, (run, part)) in enumerate(zip(comparison.rows, comparison.networks, strict=True)):
        if progress is not None:
            progress(f"exporting {row.name}", number / len(comparison.rows))
        program = run_on.backend.startswith("pytorch")
        export = partial(export_run, run, part=part, with_pytorch=program, folder=folder / str(number))
        try:
            exported = export(test_images=early_exit, early_exit=early_exit and part == "fused")
        except UsageError as error:
            left_out.append(f"early exit of {row.name}: {error}")
            exported = export(test_images=False)
        bundles.append(exported.folder)
    return bundles, left_out


def _timed_row(row: NetworkRow, result: Result) -> NetworkRow:
    """A row with what was measured of its network, and what its file multiplies and stores."""
    return dataclasses.replace(
        row,
        graph_macs=result.graph_macs,
        graph_weights=result.graph_weights,
        graph_zeros=result.graph_zeros,
        p50_ms=result.p50_ms,
        p50_low_ms=result.percentiles[50].low_ms,
        p50_high_ms=result.percentiles[50].high_ms,
        p90_ms=result.percentiles[90].ms,
    )


def _exits(
    rows: Sequence[NetworkRow], bundles: Sequence[Path], settings: BenchSettings, progress: Progress | None
) -> Iterable[ExitCurve]:
    """A curve for every S + A whose bundle has graphs for early exit; its times are held against S0's."""
    s0 = next(
        ((row.macs, file) for row, file in zip(rows, bundles, strict=True) if row.part in ("s0", "control")), None
    )
    for row, bundle in zip(rows, bundles, strict=True):
        if describe_model(bundle).early_exit:
            yield exit_curve(row.name, bundle, s0, settings.run_on[0], settings.limits, progress)


def _ratio(ours: float | None, others: float | None) -> float | None:
    return ours / others if ours is not None and others else None

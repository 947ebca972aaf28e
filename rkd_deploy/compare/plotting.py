"""A comparison as a picture: one line a network; accuracy, MACs and latency side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkd_deploy.compare.rows import Comparison, Row
from rkd_deploy.serve.bench.canvas import COLOURS, INK, QUIET, WIDTH, drawing, frame, new_figure, short, write_png


def plot(comparison: Comparison, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file could not be written.
    """
    write_png(draw(comparison), path)


@drawing()
def draw(comparison: Comparison, *, narrow: bool = False) -> Any:
    """The matplotlib Figure of `plot`; narrow: for a page that a phone shows too, its panels one below the other."""
    rows = comparison.rows
    values: list[tuple[str, Callable[[Row], float | None]]] = [("MACs of one image, M", lambda row: row.macs / 1e6)]
    if any(row.p50_ms is not None for row in rows):
        values.append(("Median latency, ms", lambda row: row.p50_ms))
    count = 1 + len(values)
    if narrow:
        figure = new_figure(WIDTH, count * (0.6 + 0.28 * len(rows)))
        panels = figure.subplots(count, 1)
    else:
        figure = new_figure(5 + 3 * (count - 1), 1.5 + 0.36 * len(rows))
        panels = figure.subplots(1, count, sharey=True, width_ratios=[2, 1, 1][:count])
        title = f"{comparison.data}, {comparison.test_images:,} test images"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    _accuracy(panels[0], rows)
    for axes, (label, value) in zip(panels[1:], values, strict=True):
        _bars(axes, rows, value, label)
    for axes in panels:
        frame(axes, "x")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        if narrow or axes is panels[0]:
            axes.set_yticks(range(len(rows)), [short(row.name, 32) if narrow else row.name for row in rows], color=INK)
            axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _accuracy(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        half = row.standard_error if row.deviation is None else row.deviation
        axes.errorbar(
            row.top1, place, xerr=half, fmt="o", markersize=6, capsize=3, elinewidth=1.2, color=COLOURS[row.part]
        )
        axes.annotate(
            f"{row.top1:.1f}",
            (row.top1 + half, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=QUIET,
        )
    # Where S0 stands is what every other network is read against.
    for row in rows:
        if row.part == "s0":
            axes.axvline(row.top1, color=COLOURS["s0"], linewidth=0.8, alpha=0.5, linestyle=":", zorder=0)
            break
    axes.margins(x=0.12)
    axes.set_xlabel("Top-1, % (bar: deviation or error)", color=INK)


def _bars(axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], label: str) -> None:
    known = [(place, value(row), COLOURS[row.part]) for place, row in enumerate(rows)]
    for place, length, colour in known:
        if length is None:
            continue
        axes.barh(place, length, height=0.55, color=colour, alpha=0.85)
        axes.annotate(
            f"{length:.3g}",
            (length, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=QUIET,
        )
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=INK)

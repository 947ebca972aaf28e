"""Accuracy against latency with the Pareto front: up and to the left is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rkd_deploy.bench.statistics import Z_95
from rkd_deploy.errors import DataError
from rkd_deploy.report.style import (
    COLOURS,
    INK,
    LINE,
    OTHER,
    QUIET,
    frame,
    log_scale,
    new_figure,
    plot_style,
    short,
    write_png,
)
from rkd_deploy.text import visible

if TYPE_CHECKING:
    from rkd_deploy.bench.loading import Case
    from rkd_deploy.bench.results import Result

_LEGEND = {
    "teacher": "teacher",
    "s0": "S0, the given model",
    "control": "S0, same losses",
    "student": "student alone",
    "fused": "student + assistant",
}
_FRONT = "_pareto front"  # the underscore keeps it out of legends
_Spot: TypeAlias = tuple[float, float]

_LOG_FROM = 5
"""Ratio of the slowest to the fastest from which the time axis is logarithmic."""
_FAR = 9
"""Printer's points between a point and its name from which a line joins them."""


def write_plot(results: Sequence[Result], path: Path, *, batch: int | None = None) -> None:
    """Write accuracy against median latency, the 95 % confidence interval of the median as a bar.

    Args:
        results: Those without an accuracy are left out.
        path: PNG file to write.
        batch: Which batch size; None takes the smallest.

    Raises:
        DataError: No result at this batch size has an accuracy.
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file could not be written.
    """
    write_png(draw(results, batch), path)


@plot_style()
def draw(
    results: Sequence[Result], batch: int | None = None, *, size: tuple[float, float] = (8, 4.8), titled: bool = True
) -> Any:
    """The matplotlib Figure of `write_plot`, so many inches wide and high; without a title where a page has one."""
    points = _points(results, batch)
    figure = new_figure(*size)
    axes = figure.subplots()
    _scatter(axes, points)
    _frame(axes, points)
    _title(axes, points, titled, columns=4 if size[0] > 6 else 2)
    _front(axes, points)
    figure.canvas.draw()  # settles the layout, so that the names are placed where they will stand
    _label(axes, points)
    return figure


def pareto_front(points: Sequence[Result]) -> list[Result]:
    """The points that none beats: no other is at least as fast and as accurate, and better in one of the two.

    Args:
        points: Each with an accuracy.

    Returns:
        From the fastest to the most accurate; points that are equal in both stand all there.
    """
    front: list[Result] = []
    # From the fastest on, the most accurate first of equally fast ones: then a point is beaten exactly where one before
    # it is at least as accurate.
    for point in sorted(points, key=lambda result: (result.p50_ms, -_accuracy(result))):
        last = front[-1] if front else None
        if last is None or _accuracy(point) > _accuracy(last) or _same_place(point, last):
            front.append(point)
    return front


def _same_place(result: Result, other: Result) -> bool:
    return (result.p50_ms, result.accuracy) == (other.p50_ms, other.accuracy)


def _accuracy(result: Result) -> float:
    assert result.accuracy is not None
    return result.accuracy


def _front(axes: Any, points: Sequence[Result]) -> None:
    """A staircase: the best accuracy of these points that a latency buys."""
    if len(points) < 2:
        return
    front = pareto_front(points)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    times = [front[0].p50_ms, *(result.p50_ms for result in front), right]
    heights = [bottom, *(_accuracy(result) for result in front), _accuracy(front[-1])]
    axes.step(times, heights, where="post", label=_FRONT, color=LINE, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _points(results: Sequence[Result], batch: int | None) -> list[Result]:
    known = [result for result in results if result.accuracy is not None]
    wanted = min((result.batch for result in known), default=None) if batch is None else batch
    points = [result for result in known if result.batch == wanted]
    if not points:
        raise DataError(
            f"Nothing to plot: of {len(results)} results, {len(known)} have an accuracy"
            + (f" and none of these is at batch {batch}. " if batch is not None else ". ")
            + "The plot takes the accuracy from the model card: export the models from runs that were evaluated."
        )
    return sorted(points, key=lambda result: result.p50_ms)


def _scatter(axes: Any, points: Sequence[Result]) -> None:
    for part in (*COLOURS, None):
        group = [result for result in points if (result.part if result.part in COLOURS else None) == part]
        if not group:
            continue
        times, ends = np.array([result.p50_ms for result in group]), np.array([_ends(result) for result in group])
        colour = COLOURS.get(part or "", OTHER)
        axes.errorbar(
            times,
            [result.accuracy for result in group],
            xerr=[(times - ends[:, 0]).clip(0), (ends[:, 1] - times).clip(0)],  # a record may have been edited
            fmt="o",
            markersize=6,
            color=colour,
            elinewidth=1.2,
            capsize=4.5,
            capthick=1.2,
            zorder=3,
            label=_LEGEND.get(part or "", "other"),
        )
        # Thinner and without caps: the interval of the accuracy is that of other test images, not of this machine.
        for result in group:
            axes.vlines(result.p50_ms, *accuracy_interval(result), color=colour, linewidth=1, alpha=0.5, zorder=2)


def accuracy_interval(result: Result) -> tuple[float, float]:
    """The 95 % interval of an accuracy in % (Wilson 1927), for other test images of the same kind.

    Where the number of images is not known, both ends are the accuracy.
    """
    accuracy, n = result.accuracy or 0.0, result.accuracy_images
    if not n:
        return accuracy, accuracy
    z, p = Z_95, accuracy / 100
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def _frame(axes: Any, points: Sequence[Result]) -> None:
    lows, highs = zip(*map(_ends, points), strict=True)
    fast, slow = min(lows), max(highs)
    # With the intervals in it the axis never stretches one image to its full height.
    intervals = [accuracy_interval(result) for result in points]
    lowest, highest = min(low for low, _ in intervals), max(high for _, high in intervals)
    room = 0.12 * (highest - lowest or 1.0)
    axes.set_ylim(lowest - room, highest + room)
    if slow / fast >= _LOG_FROM:
        axes.set_xscale("log")
        # Room for names on both sides: a share of the span, on a logarithmic axis as a factor.
        room = (slow / fast) ** 0.22
        axes.set_xlim(fast / room, slow * room)
        log_scale(axes.xaxis)
    else:
        room = 0.22 * max(slow - fast, 0.1 * slow)
        axes.set_xlim(max(0, fast - room), slow + room)
    axes.set_xlabel("Median latency of one call, ms", color=INK)
    axes.set_ylabel("Top-1 accuracy, %", color=INK)
    frame(axes)


def _title(axes: Any, points: Sequence[Result], titled: bool, columns: int) -> None:
    parts = len({result.part for result in points})
    if titled:
        where = " and ".join(sorted({f"{result.backend} on {result.device}" for result in points}))
        title = f"Accuracy against latency, batch {points[0].batch}, {where}"
        axes.set_title(visible(title), loc="left", fontsize=12, color=INK, pad=26 if parts > 1 else 8)
    if parts > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.012, 1.0),
            ncols=min(parts, columns),
            frameon=False,
            fontsize=9,
            labelcolor=QUIET,
            handletextpad=0.3,
            columnspacing=1.4,
            borderaxespad=0.1,
        )


def point_names(points: Sequence[Result | Case]) -> list[str]:
    """The model's name for each point, and where it is not the only one, the facts that tell the points apart."""
    unique = [result.model for result in points]
    for fact in ("part", "fusion", "precision", "backend", "device", "threads", "streams", "scenario"):
        values = [getattr(result, fact, None) for result in points]
        groups = {name: {v for n, v in zip(unique, values, strict=True) if n == name} for name in unique}
        words = [f"{fact} {value}" if isinstance(value, int) else value for value in values]
        unique = [
            f"{name}, {word}" if len(groups[name]) > 1 and word is not None else name
            for name, word in zip(unique, words, strict=True)
        ]
    return unique


def _label(axes: Any, points: Sequence[Result]) -> None:
    """Name every point where its text touches no other text, no point, no line and no edge.

    The nearest free place around the point is taken; a line leads to a name that had to go far.
    """
    renderer = axes.figure.canvas.get_renderer()
    bars = [_bar_box(axes, result) for result in points]
    texts: list[Any] = []
    lines = [spot for line in axes.lines if line.get_label() == _FRONT for spot in _along_stairs(axes, line)]
    for result, name, bar in zip(points, point_names(points), bars, strict=True):
        text = axes.annotate(
            f"{short(name)}\n{result.accuracy:.1f} %, {result.p50_ms:.3g} ms",
            (result.p50_ms, result.accuracy),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.25,
            color=INK,
            zorder=4,
        )
        spot = tuple(axes.transData.transform((result.p50_ms, result.accuracy)))
        text.set_position(_free_place(axes, text, spot, bars, texts, lines))
        box = text.get_window_extent(renderer)
        texts.append(box)
        end = _nearest(box, spot)
        if math.dist(_nearest(bar, end), end) > _FAR * axes.figure.dpi / 72:
            style = {"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
            # In data, not in pixels: another resolution (PNG, SVG) has others.
            tip, tail = axes.transData.inverted().transform([spot, end])
            axes.annotate("", tip, tail, arrowprops=style, zorder=2)
            lines += _along(spot, end)


def _free_place(
    axes: Any, text: Any, spot: _Spot, bars: Sequence[Any], texts: Sequence[Any], lines: Sequence[_Spot]
) -> _Spot:
    """Offset of a text from its point, in printer's points, that covers the fewest pixels of other things."""
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    size = text.get_window_extent(renderer)
    scale = 72 / axes.figure.dpi
    best = (math.inf, (0.0, 0.0))
    for place in _places(size.width * scale, size.height * scale):
        box = size.translated(place[0] / scale, place[1] / scale).padded(3)
        # Costs in pixels. A line through a text is worse than a corner of a box under it, and a name beyond the edge
        # would be cut off: hence the weights. Below 1 nothing is touched, and nearer places were tried first.
        covered = sum(_overlap(box, other) for other in (*bars, *texts)) + 50 * sum(box.contains(*at) for at in lines)
        outside = box.width * box.height - _overlap(box, inside)
        crossed = sum(other.contains(*at) for at in _along(spot, _nearest(box, spot)) for other in texts)
        cost = covered + 4 * outside + 50 * crossed
        if cost < 1:
            return place
        best = min(best, (cost, place))
    return best[1]


def _places(width: float, height: float) -> list[_Spot]:
    """Offsets of a name's centre from its point, in printer's points, nearest first."""
    places: list[_Spot] = []
    for ring in range(8):
        away = 9.0 + 9 * ring
        sideways, upright = width / 2 + away, height / 2 + away
        places += [(0.0, upright), (0.0, -upright), (sideways, 0.0), (-sideways, 0.0)]
        for slide in (0.5, 1.0):
            places += [(x * slide * sideways, y * upright) for x in (1, -1) for y in (1, -1)]
    return places


def _bar_box(axes: Any, result: Result) -> Any:
    """The pixels that a point and its interval cover."""
    from matplotlib.transforms import Bbox

    low, high = _ends(result)
    (left, y), (right, _) = axes.transData.transform([(low, result.accuracy), (high, result.accuracy)])
    pad = 5 * axes.figure.dpi / 72
    return Bbox.from_extents(left - pad, y - pad, right + pad, y + pad)


def _along(start: _Spot, end: _Spot) -> list[_Spot]:
    return [(x, y) for x, y in np.linspace(start, end, 25).tolist()]


def _along_stairs(axes: Any, line: Any) -> list[_Spot]:
    """The pixels of a staircase, corners and between them."""
    xs, ys = line.get_data()
    corners = [(xs[0], ys[0])]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        corners += [(x, corners[-1][1]), (x, y)]
    spots = [tuple(spot) for spot in axes.transData.transform(corners)]
    return [at for start, end in itertools.pairwise(spots) for at in _along(start, end)]


def _nearest(box: Any, point: _Spot) -> _Spot:
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)


def _ends(result: Result) -> tuple[float, float]:
    median = result.percentiles[50]
    return (
        median.ms if median.low_ms is None else median.low_ms,
        median.ms if median.high_ms is None else median.high_ms,
    )


def _overlap(box: Any, other: Any) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0

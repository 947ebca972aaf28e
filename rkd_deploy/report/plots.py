"""Draws the pictures of a report, each as wide as a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.bench.layers import LayerMedian
from rkd_deploy.bench.results import Figures, Result
from rkd_deploy.report.style import INK, LINE, QUIET, WIDTH, frame, log_scale, new_figure, plot_style, short
from rkd_deploy.text import visible

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_LOG_FROM = 5
_RANKS = 400
"""Steps of a drawn distribution: more cannot be seen."""
_BINS = 48

Named = Mapping[str, Figures]
"""Figures by the names that they have on the page."""


@plot_style()
def distributions(results: Named, colours: Mapping[str, str]) -> Any:
    """Share of calls that took at most so long, a staircase for each model; every sample counts."""
    figure = new_figure(WIDTH, 3.1 + 0.2 * len(results))
    axes = figure.subplots()
    for number, (name, result) in enumerate(results.items()):
        times_N = np.sort(np.asarray(result.samples_ms))
        # Every rank is a call, so nothing is averaged; of more calls than pixels, evenly spaced ranks give the same
        # picture.
        ranks = np.unique(np.linspace(0, len(times_N) - 1, min(_RANKS, len(times_N))).round().astype(int))
        shares = 100 * (ranks + 1) / len(times_N)
        axes.step(
            np.concatenate([times_N[:1], times_N[ranks]]),
            np.concatenate([[0.0], shares]),
            where="post",
            color=colours[name],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=1.6,
            label=short(name),
        )
    for percentile in (50, 90, 99):
        axes.axhline(percentile, color=LINE, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_yticks([0, 25, 50, 75, 90, 99], ["0", "25", "50", "75", "90", "99"])
    axes.set_ylim(0, 101)
    _time_axis(axes, [result.samples_ms for result in results.values()])
    axes.set_ylabel("Calls at most so long, %", color=INK)
    frame(axes, "x")
    _legend(figure, len(results))
    return figure


@plot_style()
def histograms(results: Named, colours: Mapping[str, str]) -> Any:
    """How often a call took how long, one row for each model, all with the same bins; every sample counts."""
    count = len(results)
    figure = new_figure(WIDTH, 0.75 + 0.85 * count)
    rows = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    samples = [np.asarray(result.samples_ms) for result in results.values()]
    edges = _edges(samples)
    for axes, (name, result), times_N in zip(rows, results.items(), samples, strict=True):
        shares, _ = np.histogram(times_N, edges)
        axes.stairs(100 * shares / len(times_N), edges, fill=True, color=colours[name], alpha=0.75)
        axes.axvline(result.p50_ms, color=INK, linewidth=1, linestyle=":")
        axes.set_title(f"{short(name)}, {len(times_N):,} calls", loc="left", fontsize=10, color=INK, pad=3)
        frame(axes, "x")
        axes.locator_params(axis="y", nbins=3)
    _time_axis(rows[-1], samples)
    figure.supylabel("Calls in a bin, %", fontsize=10, color=INK)
    return figure


@plot_style()
def throughputs(results: Mapping[str, Sequence[Result]], colours: Mapping[str, str]) -> Any:
    """Images per second over the batch size, a line for each model."""
    figure = new_figure(WIDTH, 3.1 + 0.2 * len(results))
    axes = figure.subplots()
    for number, (name, points) in enumerate(results.items()):
        axes.plot(
            [point.batch for point in points],
            [point.throughput_per_s for point in points],
            color=colours[name],
            linestyle=_DASHES[number % len(_DASHES)],
            marker="o",
            markersize=5,
            linewidth=1.6,
            label=short(name),
        )
    batches = sorted({point.batch for points in results.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    highs = [point.throughput_per_s for points in results.values() for point in points]
    if max(highs) / min(highs) >= _LOG_FROM:
        axes.set_yscale("log")
        log_scale(axes.yaxis)
    else:
        axes.set_ylim(0, 1.1 * max(highs))
    axes.set_xlabel("Images in a call", color=INK)
    axes.set_ylabel("Images/s", color=INK)
    frame(axes)
    _legend(figure, len(results))
    return figure


@plot_style()
def layer_bars(layers: Sequence[LayerMedian], colour: str, count: int = 14) -> Any:
    """The layers that take longest, and all others together."""
    ordered = sorted(layers, key=lambda layer: -layer.ms)
    top, rest = ordered[:count], ordered[count:]
    bars = [(f"{short(layer.name, 32)}  ({visible(layer.op)})", layer.ms) for layer in top]
    if rest:
        bars.append((f"{len(rest)} others", sum(layer.ms for layer in rest)))
    total = sum(layer.ms for layer in layers) or 1.0
    figure = new_figure(WIDTH, 0.7 + 0.39 * len(bars))
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(places, [ms for _, ms in bars], height=0.3, color=colour, alpha=0.85, align="edge")
    for place, (name, ms) in enumerate(bars):
        # The name stands above its bar: beside it, it would leave the bars no room on a phone.
        axes.annotate(name, (0, place), (0, 2), textcoords="offset points", va="bottom", fontsize=9.5, color=INK)
        share = f" {ms:.3g} ms, {100 * ms / total:.0f} %"
        axes.annotate(
            share, (ms, place + 0.15), (2, 0), textcoords="offset points", va="center", fontsize=9.5, color=QUIET
        )
    axes.set_ylim(len(bars) - 0.4, -0.75)
    axes.set_xlim(0, 1.32 * max((ms for _, ms in bars), default=1.0) or 1.0)
    axes.set_yticks([])
    axes.set_xlabel("Median time in the layer, ms", color=INK)
    frame(axes, "x")
    return figure


@plot_style()
def roofs(
    lines: Sequence[tuple[str, float, float]],
    points: Mapping[str, Sequence[tuple[float, float, int]]],
    colours: Mapping[str, str],
) -> Any:
    """Multiply-adds per second over multiply-adds per byte: the roof, and where each model stands below it.

    Args:
        lines: Name ("" for the only roof), MAC/s and bytes/s of each roof.
        points: MACs per byte, MAC/s and batch of each measurement, by model.
        colours: Colours by model.
    """
    figure = new_figure(WIDTH, 3.3 + 0.2 * len(points))
    axes = figure.subplots()
    # The bend of each roof must be in the picture, also where all models lie on one side of it.
    ridges = [peak / rate for _, peak, rate in lines]
    intensities = [x for spots in points.values() for x, _, _ in spots] + ridges
    left, right = min(intensities) / 2.5, max(intensities) * 2.5
    reach_I = np.geomspace(left, right, 60)
    named: list[float] = []
    for name, peak, rate in sorted(lines, key=lambda line: -line[1]):
        axes.plot(reach_I, np.minimum(peak, rate * reach_I) / 1e9, color=INK, linewidth=1.3)
        # Of several roofs there is room for the names of those that lie apart; the page has a table of all.
        if all(other > 1.3 * peak for other in named):
            flat = {"textcoords": "offset points", "fontsize": 9.5, "color": QUIET}
            axes.annotate(f"{visible(name)}{peak / 1e9:,.3g} GMAC/s", (right, peak / 1e9), (-2, 3), ha="right", **flat)
            named.append(peak)
        if len(lines) <= 2:
            _name_slope(axes, peak, rate, left, right)
    for name, spots in points.items():
        xs, ys, batches = zip(*spots, strict=True)
        axes.plot(
            xs, np.array(ys) / 1e9, color=colours[name], marker="o", markersize=5, linewidth=0.8, label=short(name)
        )
        for x, y, batch in zip(xs, ys, batches, strict=True):
            axes.annotate(
                str(batch), (x, y / 1e9), (0, -12), textcoords="offset points", ha="center", fontsize=10, color=QUIET
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    for axis in (axes.xaxis, axes.yaxis):
        log_scale(axis)
    axes.margins(y=0.18)
    axes.set_xlabel("MACs for each byte that has to be moved", color=INK)
    axes.set_ylabel("GMAC/s", color=INK)
    frame(axes)
    _legend(figure, len(points))
    return figure


def _name_slope(axes: Any, peak: float, rate: float, left: float, right: float) -> None:
    middle = (left * min(peak / rate, right)) ** 0.5
    axes.text(
        middle,
        1.06 * rate * middle / 1e9,
        f"{rate / 1e9:,.3g} GB/s",
        rotation=float(np.degrees(np.arctan(rate / 1e9))),  # that of the line, whose slope is this one in data
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
        va="bottom",
        fontsize=10,
        color=QUIET,
    )


def _legend(figure: Any, count: int) -> None:
    if count > 1:
        figure.legend(loc="outside upper left", ncols=1, frameon=False, fontsize=10, labelcolor=INK, borderaxespad=0.1)


def _time_axis(axes: Any, samples: Sequence[Sequence[float] | npt.NDArray[Any]]) -> None:
    fast, slow = min(map(min, samples)), max(map(max, samples))
    if slow / fast >= _LOG_FROM:
        axes.set_xscale("log")
        log_scale(axes.xaxis)
    axes.set_xlabel("Time of one call, ms", color=INK)


def _edges(samples: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    fast, slow = min(map(np.min, samples)), max(map(np.max, samples))
    if fast == slow:
        fast, slow = 0.99 * fast, 1.01 * slow
    # Bins as wide as they look: equal ratios where the axis is logarithmic.
    spaced = np.geomspace if slow / fast >= _LOG_FROM else np.linspace
    edges = spaced(fast, slow, _BINS + 1)
    edges[0], edges[-1] = fast, slow  # rounding must not lose the outermost samples
    return edges

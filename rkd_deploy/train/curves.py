"""Draws the log of a run: losses and accuracies by epoch, a panel for each phase."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from rkd_deploy.errors import require
from rkd_deploy.recipe import Recipe
from rkd_deploy.storage import write_bytes
from rkd_deploy.text import visible
from rkd_deploy.train.log import read_epochs
from rkd_deploy.train.runs import Run

# Okabe and Ito's palette, which people with a colour vision deficiency can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _QUIET = "#1f1f1f", "#6b6b6b"
_ACCURACIES = {"train_top1": "training images", "val_top1": "held out", "val_top1_ema": "held out, average"}
_NO_LOSS = {"event", "phase", "epoch", "lr", "seconds", "images_per_s", "grad_norm", "explained", *_ACCURACIES}


def draw_curves(run: Run, recipe: Recipe) -> None:
    """Draw the curves of the log so far, where the recipe wants them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file could not be written.
    """
    rows = [epoch.to_json() for epoch in read_epochs(run.log.path)]
    if not recipe.train.curves or not rows:
        return
    content = io.BytesIO()
    draw_phases(rows, visible(run.folder.name)).savefig(content, format="png")
    write_bytes(run.folder / "curves.png", content.getvalue())


def draw_phases(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """The matplotlib Figure: a column for each phase, its losses above, its accuracies below.

    Args:
        rows: Epochs of log.jsonl.
        title: Name of the run.
    """
    require("matplotlib", "train")
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):  # a run's name is no formula, whatever signs it has
        return _draw(rows, title)


def _draw(rows: Sequence[dict[str, Any]], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(row["phase"] for row in rows))
    figure = Figure(figsize=(1.2 + 3.4 * len(phases), 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(phases), sharex="col", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    for column, phase in enumerate(phases):
        epochs = [row for row in rows if row["phase"] == phase]
        _losses(grid[0][column], epochs)
        _accuracies(grid[1][column], epochs)
        grid[0][column].set_title(phase.replace("_", " "), loc="left", fontsize=11, color=_INK)
    for axes in grid[1][1:]:
        axes.sharey(grid[1][0])  # accuracies of all phases can be compared by eye
    grid[0][0].set_ylabel("loss and its parts")
    grid[1][0].set_ylabel("top-1, %")
    return figure


def _losses(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the losses of a phase on a logarithmic scale; a part that is the whole loss is drawn once."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    parts = [name for name in rows[0] if name not in _NO_LOSS]
    if len(parts) == 2 and all(math.isclose(row[parts[0]], row[parts[1]], rel_tol=1e-6) for row in rows):
        parts.remove("loss")
    for colour, name in zip(_COLOURS, parts, strict=False):
        _line(axes, rows, name, name.replace("_", " "), colour, thick=name == "loss")
    if all(row[name] > 0 for row in rows for name in parts):  # a distance of maps falls by orders of magnitude
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _frame(axes)


def _accuracies(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the accuracies of a phase, its last epoch, which ships, and its best on held-out images marked."""
    for colour, (key, label) in zip(_COLOURS, _ACCURACIES.items(), strict=False):
        if rows[0].get(key) is not None:
            _line(axes, rows, key, label, colour, thick=False)
    if rows[0].get("val_top1") is not None:
        best = max(rows, key=lambda row: row["val_top1"])
        for row, marker, name in ((best, "*", "best"), (rows[-1], "o", "last")):
            label = f"{name}: {row['val_top1']:.1f} % (epoch {row['epoch']})"
            size = 11 if marker == "*" else 6
            axes.plot(row["epoch"], row["val_top1"], marker, ms=size, color=_COLOURS[1], mec="white", label=label)
    axes.set_xlabel("epoch")
    _frame(axes)


def _line(axes: Any, rows: Sequence[dict[str, Any]], key: str, label: str, colour: str, *, thick: bool) -> None:
    """Draw one value over the epochs; points where there are few, so that a phase of one epoch shows."""
    epochs = [row["epoch"] for row in rows]
    marker = "." if len(rows) < 20 else ""
    axes.plot(epochs, [row[key] for row in rows], marker=marker, lw=2.4 if thick else 1.4, color=colour, label=label)


def _frame(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_QUIET)
    if axes.get_lines():  # an early stage of the progressive scheme classifies nothing
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK)

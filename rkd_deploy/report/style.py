"""Gives all pictures their colours, for paper and for dark screens, and their axes.

A figure is drawn in the light colours. As PNG it stays so; in a page (`page.inline_svg`) each of these colours becomes
a CSS variable, which is why nothing may be drawn in a colour that has no name here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rkd_deploy.errors import require
from rkd_deploy.storage import write_bytes
from rkd_deploy.text import visible

# Light and dark. Series: Okabe and Ito's hues, which people with a colour vision deficiency can tell apart, darkened or
# lightened until each stands out 3:1 from its background (WCAG 2.2, 1.4.11).
THEME = {
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1f1f1f", "#e6e6e6"),
    "quiet": ("#5f5f5f", "#a9adb5"),
    "line": ("#9a9a9a", "#6f757f"),
    "grid": ("#e8e8e8", "#2b2f36"),
    "teacher": ("#555555", "#b8bcc4"),
    "s0": ("#0072b2", "#5bb0ea"),
    "control": ("#3d5a98", "#8fa8e0"),
    "student": ("#009e73", "#34c79b"),
    "fused": ("#d55e00", "#ff8f45"),
    "other": ("#b8578f", "#e59cc6"),
    "violet": ("#6a51a3", "#ab93f0"),
    "ochre": ("#a67c00", "#e3b23c"),
    "brown": ("#8c510a", "#d6a26b"),
}
INK, QUIET, LINE, GRID, OTHER = (THEME[name][0] for name in ("ink", "quiet", "line", "grid", "other"))
COLOURS = {part: THEME[part][0] for part in ("teacher", "s0", "control", "student", "fused")}
"""Colours by part of a run."""
_SERIES = ("s0", "fused", "student", "other", "violet", "ochre", "brown", "teacher")

WIDTH = 4.8
"""Inches of a picture for a page: about as many points as a phone has pixels across, so that text keeps its size."""
_LONGEST = 44

_STYLE = {
    "text.parse_math": False,  # a model's name is no formula, whatever signs it has
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and coloured
    "svg.hashsalt": "rkd-deploy",  # the same figure, the same bytes
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The style for everything drawn and written inside; also a decorator.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "train")
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")  # a browser has the fonts that this lacks
        yield


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty matplotlib Figure of so many inches that no window will ever show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@plot_style()
def write_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        StorageError: The file could not be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())


def frame(axes: Any, grid: str = "both") -> None:
    """Quiet axes: a grid behind what is drawn, no box around it.

    Args:
        axes: The matplotlib Axes.
        grid: "x", "y" or "both".
    """
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(which="both", color=LINE, labelcolor=QUIET)
    axes.yaxis.labelpad = 7


def log_scale(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as numbers rather than powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def short(name: str, longest: int = _LONGEST) -> str:
    """A name that fits: its middle is left out where it is too long, because both ends tell more."""
    name = visible(name)
    if len(name) <= longest:
        return name
    half = (longest - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def series_colours(parts: Sequence[str | None]) -> list[str]:
    """A colour for each of some models: its part's for the first of a part, then whichever is not taken.

    Args:
        parts: Part of a run of each model; None where it is of no run.
    """
    taken: dict[str, None] = {}
    chosen: list[str | None] = []
    for part in parts:
        colour = COLOURS.get(part or "")
        chosen.append(colour if colour is not None and colour not in taken else None)
        if chosen[-1] is not None:
            taken[chosen[-1]] = None
    # Where all are taken, colours come again: dashes and markers tell the lines apart then.
    free = [THEME[name][0] for name in _SERIES if THEME[name][0] not in taken] or list(COLOURS.values())
    spare = iter(range(len(parts)))
    return [free[next(spare) % len(free)] if colour is None else colour for colour in chosen]


def distinct(values: Iterable[Hashable]) -> list[Any]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))

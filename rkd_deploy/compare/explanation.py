"""Draws what T, S and A make of one image, as a page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.report.page import Pages, Picture, Section, table_of, write_pages
from rkd_deploy.report.style import INK, WIDTH, new_figure, plot_style
from rkd_deploy.report.tables import Column
from rkd_deploy.text import visible
from rkd_deploy.train.explanation import Explanation

_CAPTIONS = {
    "f_T": "T's map",
    "P_S f_S": "S's map",
    "f_T - P_S f_S": "what S leaves over",
    "P_A f_A": "A's map",
    "f_T - sum": "what S + A leave over",
}


@dataclass(frozen=True)
class _Answer:
    network: str
    label: str
    probability: float


_COLUMNS: tuple[Column[_Answer], ...] = (
    Column("Network", lambda answer: answer.network, numeric=False),
    Column("Class", lambda answer: answer.label, numeric=False),
    Column("Probability, %", lambda answer: f"{100 * answer.probability:.1f}"),
)


def write_explanation(explanation: Explanation, facts: Mapping[str, str], page: Path) -> Pages:
    """Write the page and the same as Markdown beside it.

    Args:
        explanation: Of one image.
        facts: What stands below the title, name to value.
        page: Ends in .html.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    shares = [
        f"{name}: {100 * share:.1f} % of the mean square of T's map." for name, share in explanation.explained.items()
    ]
    answers = [_Answer(name, *answer) for name, top in explanation.answers.items() for answer in top]
    words = (
        "The image, then maps by their strength at each position, all on the scale of T's: T's, S's, what S leaves "
        "over, what A adds to correct it, and what is left."
    )
    section = Section(
        "What A corrects",
        shares,
        [Picture("Maps", words, explanation_figure(explanation)), table_of("Most likely classes", _COLUMNS, answers)],
    )
    return write_pages("T, S and A on one image", facts, [section], page.parent, page.stem)


@plot_style()
def explanation_figure(explanation: Explanation) -> Any:
    """The matplotlib Figure: the image, and five maps on one scale."""
    figure = new_figure(WIDTH, 3.7)
    panels = figure.subplots(2, 3).flat
    _show(next(panels), "the image", explanation.pixels_HWC)
    highest = max(float(values.max()) for values in explanation.maps.values())
    for axes, (name, values) in zip(panels, explanation.maps.items(), strict=True):
        _show(axes, _CAPTIONS[name], values, cmap="viridis", vmin=0, vmax=highest)
    return figure


def _show(axes: Any, caption: str, values: Any, **how: Any) -> None:
    axes.imshow(values, interpolation="nearest", **how)
    axes.set_title(visible(caption), fontsize=8, color=INK)
    axes.set_axis_off()

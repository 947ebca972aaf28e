"""Tables of anything, as Markdown and for a terminal: columns are functions of a row, units stand in the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R")

_LONGEST_WORD = 24
"""Characters of a name that a terminal keeps together."""
_PADDINGS = ((0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0))  # above, right, below, left
"""Room around a cell, the widest first: what fits a terminal is read more easily than what is squeezed into it."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column of a table.

    Attributes:
        title: Head, with the unit after a comma.
        text: The cell of a row, None where the row has no such fact; a column of nothing but None is left out.
        numeric: Aligned to the right.
        setting: A condition of a measurement rather than something found: said once where all rows share it.
        detail: Left out of a terminal that is too narrow for it.
    """

    title: str
    text: Callable[[R], str | None]
    numeric: bool = True
    setting: bool = False
    detail: bool = False


def markdown_table(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """A Markdown table of some rows; columns of which nothing is known are left out."""
    kept, cells = _cells(columns, rows)
    lines = [
        [column.title for column in kept],
        ["---:" if column.numeric else "---" for column in kept],
        *[[cell.replace("|", "\\|") for cell in row] for row in cells],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(columns: Sequence[Column[R]], rows: Sequence[R], console: Console) -> None:
    """The same for a terminal: settings that all rows share stand once, above it; details where there is room."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title, known, cells = without_shared(columns, rows)

    def table(kept: list[int], padding: tuple[int, int, int, int]) -> Table:
        heading = escape(title) or None
        made = Table(title=heading, title_justify="left", title_style="dim", box=SIMPLE_HEAD, padding=padding)
        for index in kept:
            head = known[index].title.replace(", ", "\n")  # the unit below: it is the heads that make a table wide
            words = [word for row in cells for word in row[index].split()]
            # A name is broken between its words: where the room is short, it is the heads that give way.
            least = None if known[index].numeric else min(_LONGEST_WORD, max(map(len, words), default=1))
            justify: Literal["left", "right"] = "right" if known[index].numeric else "left"
            made.add_column(head, justify=justify, overflow="fold", min_width=least)
        for row in cells:
            made.add_row(*[escape(row[index]) for index in kept])
        return made

    unbounded = console.options.update_width(10_000)  # else it measures what is left after squeezing
    everything = list(range(len(known)))
    brief = [index for index in everything if not known[index].detail]
    candidates = [table(kept, padding) for kept in (everything, brief) for padding in _PADDINGS]
    fitting = (one for one in candidates if console.measure(one, options=unbounded).maximum <= console.width)
    console.print(next(fitting, candidates[-1]))


def without_shared(columns: Sequence[Column[R]], rows: Sequence[R]) -> tuple[str, list[Column[R]], list[list[str]]]:
    """What a table shows: the settings that all rows share, once, as a line; the other columns; the cells by row."""
    known, cells = _cells(columns, rows)
    shared = [
        index
        for index, column in enumerate(known)
        if column.setting and len(cells) > 1 and len({row[index] for row in cells}) == 1
    ]
    title = ", ".join(f"{known[index].title.lower()} {cells[0][index]}" for index in shared)
    kept = [index for index in range(len(known)) if index not in shared]
    return title, [known[index] for index in kept], [[row[index] for index in kept] for row in cells]


def milliseconds(value: float) -> str:
    """Three significant digits and no exponent, down to 1 ns."""
    digits = 2 if value <= 0 else min(6, max(0, 2 - math.floor(math.log10(value))))
    return f"{value:,.{digits}f}"


def _cells(columns: Sequence[Column[R]], rows: Sequence[R]) -> tuple[list[Column[R]], list[list[str]]]:
    texts = [[column.text(row) for row in rows] for column in columns]
    known = [index for index in range(len(columns)) if any(text is not None for text in texts[index])]
    cells = [[texts[index][row] or "-" for index in known] for row in range(len(rows))]
    return [columns[index] for index in known], cells

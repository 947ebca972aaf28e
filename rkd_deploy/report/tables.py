"""Sets tables, as Markdown and for a terminal.

Columns are functions of a row; units stand in the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from rkd_deploy.text import markdown, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
        setting: A condition of a measurement rather than a result: shown once where all rows share it.
        detail: Left out of a terminal that is too narrow for it.
    """

    title: str
    text: Callable[[R], str | None]
    numeric: bool = True
    setting: bool = False
    detail: bool = False


def markdown_table(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """A Markdown table of some rows; columns of which nothing is known are left out."""
    known, cells = _cells(columns, rows)
    lines = [
        [markdown(column.title) for column in known],
        ["---:" if column.numeric else "---" for column in known],
        *[[markdown(cell) for cell in row] for row in cells],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(columns: Sequence[Column[R]], rows: Sequence[R], console: Console) -> None:
    """Print a table as wide as the terminal allows.

    Settings that all rows share stand once, above it. Where there is too little room, padding gives way first, then
    the details; names are broken between their words, numbers never. Where even that does not fit, each row becomes
    lines of a title and its value.
    """
    title, known, cells = without_shared(columns, rows)
    everything = list(range(len(known)))
    brief = [index for index in everything if not known[index].detail]
    unbounded = console.options.update_width(10_000)  # else it measures what is left after squeezing
    for shown in (everything, brief):
        for padding in _PADDINGS:
            table = _terminal_table(title, known, cells, shown, padding)
            if console.measure(table, options=unbounded).maximum <= console.width:
                console.print(table, soft_wrap=False)
                return
    if console.measure(table, options=unbounded).minimum <= console.width:
        console.print(table, soft_wrap=False)
        return
    titles = [known[index].title for index in brief]
    _print_lines(title, titles, [[row[index] for index in brief] for row in cells], console)


def _terminal_table(
    title: str,
    columns: Sequence[Column[R]],
    cells: Sequence[Sequence[str]],
    shown: Sequence[int],
    padding: tuple[int, int, int, int],
) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    heading = Text(visible(title), style="dim") if title else None  # a Text is never read as rich's mark-up
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, padding=padding)
    for index in shown:
        column = columns[index]
        head = column.title.replace(", ", "\n")  # the unit below: it is the heads that make a table wide
        words = [word for row in cells for word in row[index].split()]
        # A name is broken between its words: where the room is short, it is the heads that give way.
        least = None if column.numeric else min(_LONGEST_WORD, max(map(len, words), default=1))
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        table.add_column(Text(head), justify=justify, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*[Text(row[index], no_wrap=columns[index].numeric) for index in shown])
    return table


def _print_lines(title: str, titles: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> None:
    """A line for each cell, for terminals that no table fits."""
    if title:
        print_line(title, console)
    for row in cells:
        for name, cell in zip(titles, row, strict=True):
            print_line(f"{name}: {cell}", console)
        print_line("", console)


def print_line(text: str, console: Console, style: str | None = None) -> None:
    """Print foreign text as one line that the terminal may break, without reading mark-up in it."""
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def without_shared(columns: Sequence[Column[R]], rows: Sequence[R]) -> tuple[str, list[Column[R]], list[list[str]]]:
    """What a table shows: the settings that all rows share, once, as a line; the other columns; the cells by row."""
    known, cells = _cells(columns, rows)
    shared = [
        index
        for index, column in enumerate(known)
        if column.setting and len(cells) > 1 and len({row[index] for row in cells}) == 1
    ]
    title = ", ".join(f"{known[index].title.lower()} {cells[0][index]}" for index in shared)
    others = [index for index in range(len(known)) if index not in shared]
    return title, [known[index] for index in others], [[row[index] for index in others] for row in cells]


def milliseconds(value: float) -> str:
    """Three significant digits and no exponent, down to 1 ns."""
    # Digits behind the point so that three are significant: 2 less the power of ten that the value begins with.
    digits = 2 if value <= 0 else min(6, max(0, 2 - math.floor(math.log10(value))))
    return f"{value:,.{digits}f}"


def _cells(columns: Sequence[Column[R]], rows: Sequence[R]) -> tuple[list[Column[R]], list[list[str]]]:
    texts = [[column.text(row) for row in rows] for column in columns]
    known = [index for index in range(len(columns)) if any(text is not None for text in texts[index])]
    cells = [[visible(texts[index][row] or "-") for index in known] for row in range(len(rows))]
    return [columns[index] for index in known], cells

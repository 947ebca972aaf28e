"""What a report is made of, whatever it is written as; and Markdown, which has the tables and the words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rkd_deploy.serve.bench import tabular
from rkd_deploy.serve.bench.tabular import Column

R = TypeVar("R")


@dataclass(frozen=True)
class Picture:
    """A matplotlib Figure, and what it shows in words, for those who do not see it too."""

    title: str
    description: str
    figure: Any


@dataclass(frozen=True)
class Table:
    """Cells that are text already, units in the head."""

    caption: str
    head: Sequence[str]
    numeric: Sequence[bool]
    """Of each column: aligned to the right."""
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Opened on demand, where the page can do that."""


@dataclass(frozen=True)
class Section:
    """A headline, paragraphs, then pictures and tables."""

    title: str
    text: Sequence[str] = ()
    blocks: Sequence[Picture | Table] = ()


def table_of(caption: str, columns: Sequence[Column[R]], rows: Sequence[R], *, folded: bool = False) -> Table:
    """A table of anything; settings that all rows share stand in its caption."""
    shared, kept, cells = tabular.without_shared(columns, rows)
    said = f"{caption} ({shared})" if shared else caption
    return Table(said, [column.title for column in kept], [column.numeric for column in kept], cells, folded)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """All of it as Markdown; of a picture what it shows, in words."""
    return f"# {_inline(title)}\n" + "".join(_section(section) for section in sections)


def _section(section: Section) -> str:
    paragraphs = [f"## {_inline(section.title)}", *map(_inline, section.text)]
    for block in section.blocks:
        if isinstance(block, Picture):
            paragraphs.append(f"**{_inline(block.title)}.** {_inline(block.description)}")
        else:
            paragraphs += [_inline(block.caption) + ":", _table(block)]
    return "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def _table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[_inline(cell) for cell in table.head], rule, *[[_inline(cell) for cell in row] for row in table.rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """Text whose signs stay what they are: no mark-up, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))

"""Writes a report as one HTML file that needs nothing else, and as Markdown.

No network, no script, colours by the reader's preference.

All text that comes from files and arguments is made harmless by `rkd_deploy.text` and escaped where it is put into the
page, here and nowhere else; text in pictures is escaped by the XML writer. A content security policy forbids the page
to fetch or to run anything.
"""

from __future__ import annotations

import html
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from rkd_deploy.report import tables
from rkd_deploy.report.style import THEME, plot_style
from rkd_deploy.report.tables import Column
from rkd_deploy.storage import write_text
from rkd_deploy.text import markdown, visible

_NAMED = {light: name for name, (light, _) in THEME.items()}
_ATTRIBUTES = ("clip-path", "href", "id", "style")


@plot_style()
def inline_svg(figure: Any, identity: str, title: str, description: str) -> str:
    """The figure as an SVG element for the body of an HTML page.

    Args:
        figure: A matplotlib Figure.
        identity: In front of every id: an HTML page has one space of ids, and matplotlib numbers each figure from 1.
        title: Its name, for screen readers.
        description: What it shows, for them too.
    """
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(content.getvalue())  # written a line above: no foreign entities
    for child in list(root):
        is_style = any(_local(inner.tag) == "style" for inner in child)  # which the page's own sheet says
        if is_style or _local(child.tag) in ("metadata", "title"):
            root.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _adapted(name, value, identity) for name, value in attributes.items()})
    for name in ("width", "height", "version"):  # the viewBox keeps the proportions, the page gives the size
        root.attrib.pop(name, None)
    named = {"id": f"{identity}-title"}, {"id": f"{identity}-desc"}
    root.attrib |= {"role": "img", "aria-labelledby": f"{identity}-title {identity}-desc"}
    for place, (tag, attributes, text) in enumerate(
        (("title", named[0], title), ("desc", named[1], description)),
    ):
        element = ET.Element(tag, attributes)
        element.text = visible(text)
        root.insert(place, element)
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _adapted(name: str, value: str, identity: str) -> str:
    if name not in _ATTRIBUTES:
        return value
    if name == "id":
        return f"{identity}-{value}"
    if name == "style":
        # The size and weight stay, the family goes: text is set in the font of the page, which the reader has.
        value = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", _font, value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        value = re.sub(r"#[0-9a-fA-F]{6}\b", _variable, value)
    return re.sub(r"^#|url\(#", lambda match: f"{match[0]}{identity}-", value)


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}{weight}"


def _variable(match: re.Match[str]) -> str:
    name = _NAMED.get(match[0].lower())
    assert name is not None, f"{match[0]} has no name in the theme, and would be unreadable on the other background"
    return f"var(--{name})"


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
    """Whether a column is aligned to the right, for each."""
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether it is opened on demand, where the page can do that."""


@dataclass(frozen=True)
class Section:
    """A headline, paragraphs, then pictures and tables."""

    title: str
    text: Sequence[str] = ()
    blocks: Sequence[Picture | Table] = ()


def table_of(caption: str, columns: Sequence[Column[R]], rows: Sequence[R], *, folded: bool = False) -> Table:
    """A table of anything; settings that all rows share stand in its caption."""
    shared, others, cells = tables.without_shared(columns, rows)
    caption = f"{caption} ({shared})" if shared else caption
    return Table(caption, [column.title for column in others], [column.numeric for column in others], cells, folded)


def sections_markdown(title: str, sections: Sequence[Section]) -> str:
    """A report as Markdown; of a picture what it shows, in words."""
    return f"# {markdown(title)}\n" + "".join(_markdown_section(section) for section in sections)


def _markdown_section(section: Section) -> str:
    paragraphs = [f"## {markdown(section.title)}", *map(markdown, section.text)]
    for block in section.blocks:
        if isinstance(block, Picture):
            paragraphs.append(f"**{markdown(block.title)}.** {markdown(block.description)}")
        else:
            paragraphs += [markdown(block.caption) + ":", _markdown_table(block)]
    return "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def _markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[markdown(cell) for cell in table.head], rule, *[[markdown(cell) for cell in row] for row in table.rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Pages:
    """The two files of a report, HTML and Markdown."""

    page: Path
    markdown: Path


def write_pages(title: str, facts: Mapping[str, str], sections: Sequence[Section], folder: Path, name: str) -> Pages:
    """Write NAME.html and NAME.md; what an earlier report left there is replaced.

    Args:
        title: Title of the page.
        facts: What stands below the title in a line: name to value.
        sections: The content.
        folder: Made when it is not there.
        name: Name of both files, without the suffix.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    pages = Pages(folder / f"{name}.html", folder / f"{name}.md")
    summary = Section(
        "In short", (), [Table("What was measured", ["What", "Value"], [False, False], list(facts.items()))]
    )
    write_text(pages.page, page(title, facts, sections))
    write_text(pages.markdown, sections_markdown(title, [summary, *sections] if facts else sections))
    return pages


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """A report as an HTML document."""
    contents = "".join(f'<a href="#part-{n}">{_html(section.title)}</a>' for n, section in enumerate(sections))
    terms = "".join(f"<div><dt>{_html(key)}</dt><dd>{_html(value)}</dd></div>" for key, value in facts.items())
    body = "".join(_section(f"part-{number}", section) for number, section in enumerate(sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_html(_POLICY)}">
<link rel="icon" href="data:,">
<title>{_html(title)}</title>
<style>
{_theme()}{(files(__package__) / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{_html(title)}</h1><dl>{terms}</dl><nav aria-label="Contents">{contents}</nav></header>
<main>{body}</main>
<footer>Made by rkd-deploy. This file is complete: it fetches nothing and runs nothing.</footer>
</body>
</html>
"""


def _html(text: str) -> str:
    """Foreign text for the body or an attribute of the page."""
    return html.escape(visible(text))


def _theme() -> str:
    light = "".join(f"--{name}:{colour};" for name, (colour, _) in THEME.items())
    dark = "".join(f"--{name}:{colour};" for name, (_, colour) in THEME.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _section(identity: str, section: Section) -> str:
    blocks = [
        _figure(f"{identity}-{number}", block) if isinstance(block, Picture) else _table(f"{identity}-{number}", block)
        for number, block in enumerate(section.blocks)
    ]
    text = "".join(f"<p>{_html(paragraph)}</p>" for paragraph in section.text)
    return (
        f'<section id="{identity}" aria-labelledby="{identity}-head">'
        f'<h2 id="{identity}-head">{_html(section.title)}</h2>{text}'
        f'<div class="blocks">{"".join(blocks)}</div></section>\n'
    )


def _figure(identity: str, picture: Picture) -> str:
    drawn = inline_svg(picture.figure, identity, picture.title, picture.description)
    return (
        f"<figure><figcaption><h3>{_html(picture.title)}</h3></figcaption>{drawn}"
        f"<p>{_html(picture.description)}</p></figure>\n"
    )


def _table(identity: str, table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]
    head = "".join(f'<th scope="col"{kind}>{_html(cell)}</th>' for cell, kind in zip(table.head, kinds, strict=True))
    rows = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in table.rows)
    caption = f'<caption id="{identity}-caption"><span>{_html(table.caption)}</span></caption>'
    # Wider than a phone it scrolls in its own box, by keyboard too; the page itself never does.
    box = (
        f'<div class="table" role="region" tabindex="0" aria-labelledby="{identity}-caption"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
    return f"<details><summary>{_html(table.caption)}</summary>{box}</details>\n" if table.folded else box


def _cells(row: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = zip(row, kinds, strict=True)
    cells = "".join(f"<td{kind}>{_html(cell)}</td>" for cell, kind in others)
    return f'<th scope="row"{first[1]}>{_html(first[0])}</th>{cells}'

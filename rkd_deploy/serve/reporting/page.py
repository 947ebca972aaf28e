"""A report as one HTML file that needs nothing else: no network, no script, colours by the reader's preference.

All text that comes from files and arguments is escaped where it is put into the page, here and nowhere else; pictures
are escaped by the XML writer of `svg`. A content security policy forbids the page to fetch or to run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from rkd_deploy.serve.bench.canvas import THEME
from rkd_deploy.serve.reporting.document import Picture, Section, Table, markdown
from rkd_deploy.serve.reporting.svg import inline_svg
from rkd_deploy.storage import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Pages:
    """Where a report was written to."""

    page: Path
    markdown: Path


def write_pages(title: str, facts: Mapping[str, str], sections: Sequence[Section], folder: Path, name: str) -> Pages:
    """Write NAME.html and NAME.md; what an earlier report left there is replaced.

    Args:
        title: Of the page.
        facts: What stands below it in a line: name to value.
        sections: The content.
        folder: Made when it is not there.
        name: Of both files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    pages = Pages(folder / f"{name}.html", folder / f"{name}.md")
    said = Section("In short", (), [Table("What was measured", ["What", "Value"], [False, False], list(facts.items()))])
    write_text(pages.page, page(title, facts, sections))
    write_text(pages.markdown, markdown(title, [said, *sections] if facts else sections))
    return pages


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The whole HTML document."""
    contents = "".join(f'<a href="#part-{n}">{escape(one.title)}</a>' for n, one in enumerate(sections))
    terms = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    body = "".join(_section(f"part-{number}", section) for number, section in enumerate(sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_theme()}{(files(__package__) / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><dl>{terms}</dl><nav aria-label="Contents">{contents}</nav></header>
<main>{body}</main>
<footer>Made by rkd-deploy. This file is complete: it fetches nothing and runs nothing.</footer>
</body>
</html>
"""


def _theme() -> str:
    light = "".join(f"--{name}:{colour};" for name, (colour, _) in THEME.items())
    dark = "".join(f"--{name}:{colour};" for name, (_, colour) in THEME.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _section(identity: str, section: Section) -> str:
    blocks = [
        _figure(f"{identity}-{number}", block) if isinstance(block, Picture) else _table(f"{identity}-{number}", block)
        for number, block in enumerate(section.blocks)
    ]
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in section.text)
    return (
        f'<section id="{identity}" aria-labelledby="{identity}-head">'
        f'<h2 id="{identity}-head">{escape(section.title)}</h2>{text}'
        f'<div class="blocks">{"".join(blocks)}</div></section>\n'
    )


def _figure(identity: str, picture: Picture) -> str:
    drawn = inline_svg(picture.figure, identity, picture.title, picture.description)
    return (
        f"<figure><figcaption><h3>{escape(picture.title)}</h3></figcaption>{drawn}"
        f"<p>{escape(picture.description)}</p></figure>\n"
    )


def _table(identity: str, table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(table.head, kinds, strict=True))
    rows = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in table.rows)
    caption = f'<caption id="{identity}-caption"><span>{escape(table.caption)}</span></caption>'
    # Wider than a phone it scrolls in its own box, by keyboard too; the page itself never does.
    box = (
        f'<div class="table" role="region" tabindex="0" aria-labelledby="{identity}-caption"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
    return f"<details><summary>{escape(table.caption)}</summary>{box}</details>\n" if table.folded else box


def _cells(row: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = zip(row, kinds, strict=True)
    cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in others)
    return f'<th scope="row"{first[1]}>{escape(first[0])}</th>{cells}'

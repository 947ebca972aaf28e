"""Checks the links of a built site: pages, anchors, files, and that nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
    ("object", "data"),
}
_LOADED_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest"}


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = set[str](), list[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what matters of an element."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "link" and _LOADED_RELATIONS & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        elif "href" in values and tag in ("a", "area"):
            self.links.append(values["href"])
        self.loaded += [values[name] for kind, name in _LOADED if kind == tag and values.get(name)]


def broken_links(site: Path) -> list[str]:
    """What is wrong with the links of a site, a sentence each; addresses elsewhere are held to their form alone."""
    root = site.resolve()
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    return [f"{path.relative_to(root)}: {wrong}" for path in pages for wrong in _wrong(path, pages, root)]


def _wrong(path: Path, pages: dict[Path, Page], root: Path) -> Iterator[str]:
    page = pages[path]
    for target in dict.fromkeys([*page.links, *page.loaded]):
        parts = urlsplit(target)
        if target in page.loaded and parts.netloc:
            yield f"loads {target} from elsewhere"
        if parts.scheme in ("mailto", "data", "javascript"):
            continue
        if parts.scheme or parts.netloc:
            if parts.scheme not in ("http", "https") or not re.fullmatch(
                r"[\w-]+(\.[\w-]+)+|localhost", parts.hostname or ""
            ):
                yield f"{target} is no address"
            continue
        way = unquote(parts.path)
        file = root / way.lstrip("/") if way.startswith("/") else path.parent / way if way else path
        file = file.resolve()
        file = file / "index.html" if file.is_dir() else file
        if not file.is_file():
            yield f"{target} is not there"
        elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors | {"__skip"}:
            yield f"{target}: no such anchor"

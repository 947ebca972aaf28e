"""A matplotlib Figure as inline SVG: it scales with its column, speaks, and takes its colours from the page.

matplotlib writes colours as hexadecimal numbers. Those that have a name in the theme become CSS variables, so that one
drawing is right on paper and on a dark screen.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import Any

from rkd_deploy.serve.bench.canvas import THEME, drawing

_NAMED = {light: name for name, (light, _) in THEME.items()}
_ATTRIBUTES = ("clip-path", "href", "id", "style")


@drawing()
def inline_svg(figure: Any, identity: str, title: str, description: str) -> str:
    """The figure as an SVG element for the body of an HTML page.

    Args:
        figure: Of matplotlib.
        identity: In front of every id: an HTML page has one space of ids, and matplotlib numbers each figure from 1.
        title: Its name, for screen readers.
        description: What it shows, for them too.
    """
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(_without_signs_xml_forbids(content.getvalue()))  # written a line above: no foreign entities
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
        element.text = text
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
        value = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", _font, value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        value = re.sub(r"#[0-9a-fA-F]{6}\b", _variable, value)
    return re.sub(r"^#|url\(#", lambda found: f"{found[0]}{identity}-", value)


def _font(found: re.Match[str]) -> str:
    weight = f"; font-weight: {found[1]}" if found[1] else ""
    return f"font-size: {found[2]}{weight}"


def _variable(found: re.Match[str]) -> str:
    name = _NAMED.get(found[0].lower())
    assert name is not None, f"{found[0]} has no name in the theme, and would be unreadable on the other background"
    return f"var(--{name})"


def _without_signs_xml_forbids(text: str) -> str:
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", text)

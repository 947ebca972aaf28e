"""Facts for people: one line each, where the same content as JSON would be a line of brackets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_COLUMN = 28
"""Room for a key; a longer one pushes its value aside."""


def fact_lines(content: Mapping[str, Any]) -> list[str]:
    """Every fact that is there, as ``key  value``.

    Args:
        content: What JSON can hold. Tables in tables get dotted keys, a list of tables a line for each; what is None
            or empty is left out; numbers have six significant digits.
    """
    facts = list(_flat(content))
    column = min(max((len(key) for key, _ in facts), default=0), _COLUMN)
    return [f"{key:<{column}}  {value}" for key, value in facts]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        key = prefix + name
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            rows = (", ".join(f"{column} {text}" for column, text in _flat(row)) for row in value)
            yield from ((key, row) for row in rows if row)
        elif value not in (None, "", [], ()):
            yield key, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)

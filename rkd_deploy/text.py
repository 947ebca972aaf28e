"""Makes foreign text harmless to show.

Names of files, models and labels and messages of other libraries may hold anything.
"""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#&])")


def visible(text: object) -> str:
    r"""Text in one line that does nothing but be read.

    A line feed would begin a line that looks like a command's own, an escape sequence moves the cursor or sets the
    title of the terminal, a sign for the direction of writing reverses what follows. Each of them is shown as Python
    writes it, ``\n`` or ``\x1b`` or ``\u202e``; other kinds of spaces become a plain one.
    """
    return "".join(sign if sign.isprintable() else _shown(sign) for sign in str(text))


def markdown(text: object) -> str:
    """Text in one line whose signs stay what they are in Markdown: no mark-up, no HTML, no new cell of a table."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def slug(text: str) -> str:
    """A text as a name in addresses and of folders: "digits S + A" -> "digits-s-a"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:100] or "model"


def _shown(sign: str) -> str:
    return " " if unicodedata.category(sign) == "Zs" else sign.encode("unicode_escape").decode("ascii")

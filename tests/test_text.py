"""Foreign text is shown and does nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.text import markdown, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with ümläuts, 漢字 and 😀", "plain, with ümläuts, 漢字 and 😀"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2028line\u00a0space", r"\u2028line space"),
        ("undecodable \udcff", r"undecodable \udcff"),
        (7, "7"),
    ],
)
def test_what_would_act_is_shown_as_python_writes_it(text, shown):
    assert visible(text) == shown


@given(st.text())
def test_any_text_becomes_one_printable_line(text):
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)


def test_markdown_is_escaped():
    assert markdown("<b> a|b `c` [d](e) *f* _g_ #h & i\n") == (r"\<b\> a\|b \`c\` \[d\](e) \*f\* \_g\_ \#h \& i\\n")

"""The pages as a real browser shows them: on a phone and on a desk, light and dark."""

from __future__ import annotations

import re

import headless_browser
import pytest

PICTURES = {"bench": 2 + 2 * 2 + 1 + 1, "compare": 1 + 2 + 2 * 2 + 1 + 1}
"""Accuracy, throughput, two distributions a batch size, roofline, layers; a comparison has its own before them."""

_SVGS = """[...document.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    return {left: box.left, right: box.right, width: box.width, height: box.height,
            marks: svg.querySelectorAll('path, use').length,
            outside: [...svg.querySelectorAll('text')].filter(text => {
                const at = text.getBoundingClientRect();
                return at.left < box.left - 4 || at.right > box.right + 4 || at.top < box.top - 4 ||
                       at.bottom > box.bottom + 4;
            }).map(text => text.textContent)};
})"""
_TEXTS = """[...new Set([...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill))]"""
_SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width /
    text.ownerSVGElement.viewBox.baseVal.width))"""
_WIDTHS = "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)", WCAG 2.2."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour, other):
    dim, bright = sorted((luminance(colour), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["PHONE", "DESK"])
@pytest.mark.parametrize("name", ["bench", "compare"])
def test_a_page_is_whole_wherever_it_is_read(pages, browser, name, size, dark):
    width, height = getattr(headless_browser, size)
    browser.open(pages[name], (width, height), dark=dark)
    actual = browser.evaluate(_SVGS)
    assert len(actual) == PICTURES[name]
    for box in actual:
        assert box["width"] > 250
        assert box["height"] > 120
        assert box["left"] >= 0
        assert box["right"] <= width
        assert box["marks"] > 10  # axes alone have fewer
        assert box["outside"] == []
    assert browser.evaluate(_WIDTHS) == [width, width, width] if size == "PHONE" else [width] * 3
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].as_uri()]
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.05) == dark
    colours = browser.evaluate(_TEXTS)
    assert len(colours) > 1
    assert all(contrast(colour, background) >= 4.5 for colour in colours)
    assert browser.evaluate(_SMALLEST) > 8.5  # CSS pixels
    assert browser.evaluate("document.scripts.length") == 0


def test_what_a_file_says_is_shown_as_it_is_and_does_nothing(pages, browser):
    browser.open(pages["bench"], headless_browser.DESK, dark=False)
    assert "</title><script>" in browser.evaluate("document.title")
    cells = browser.evaluate("[...document.querySelectorAll('tbody th')].map(cell => cell.textContent)")
    names = [cell for cell in cells if "bold" in cell]
    assert names
    assert all("<b>\"bold\"</b> & 'net' $x_1$" in name for name in names)
    assert browser.evaluate("document.querySelectorAll('b').length") == 0
    labels = browser.evaluate("[...document.querySelectorAll('svg text')].map(text => text.textContent)")
    assert any(label.startswith('a <b>"bold"') for label in labels)


def test_a_screen_reader_finds_names_and_tables(pages, browser):
    browser.open(pages["bench"], headless_browser.PHONE, dark=False)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in tree if node["role"]["value"] in ("image", "img") and not node.get("ignored")]
    assert len(images) == PICTURES["bench"]
    assert all(len(node["name"]["value"]) > 20 for node in images)
    captions = browser.evaluate("[...document.querySelectorAll('table')].map(t => t.caption && t.caption.textContent)")
    assert captions
    assert all(captions)


def test_the_browser_sees_what_a_bad_page_does(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><script>nothing()</script>'
        '<img src="absent.png"><svg width="900" height="20"></svg>',
        encoding="utf-8",
    )
    browser.open(bad, headless_browser.PHONE, dark=False)
    assert any("nothing is not defined" in line for line in browser.complaints())
    assert len(browser.requests()) == 2
    assert browser.evaluate(_WIDTHS)[0] > 390


def test_the_pages_policy_forbids_scripts_and_requests(pages, browser, tmp_path):
    broken = tmp_path / "injected.html"
    added = '<script>document.title = "changed"</script><img src="http://127.0.0.1:9/x.png">'
    broken.write_text(
        pages["bench"].read_text(encoding="utf-8").replace("</main>", f"</main>{added}"), encoding="utf-8"
    )
    browser.open(broken, headless_browser.DESK, dark=False)
    complaints = " ".join(browser.complaints())
    assert complaints.count("Content Security Policy") >= 2
    assert browser.evaluate("document.title") != "changed"

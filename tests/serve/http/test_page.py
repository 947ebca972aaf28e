"""The page in a real browser: on a phone and on a desk, light and dark, the golden photo gets its answer."""

from __future__ import annotations

import json

import headless_browser
import pytest

_WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"


def answered(browser):
    """Label and percentage of each class that the page shows, once it shows some."""
    browser.wait_for("document.querySelectorAll('#classes li').length === 5")
    rows = browser.evaluate(
        "[...document.querySelectorAll('#classes .name')].map(row => [...row.children].map(s => s.textContent))"
    )
    return [(label, float(percent.removesuffix(" %"))) for label, percent in rows]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["PHONE", "DESK"])
def test_a_chosen_photo_is_classified_wherever_the_page_is_looked_at(
    server, browser, photo_bundle, expected, size, dark, tmp_path
):
    width, height = getattr(headless_browser, size)
    browser.open(f"{server.address}/", (width, height), dark=dark)
    browser.wait_for("document.title !== 'Classify an image'")
    browser.choose_file("#file", photo_bundle / "golden/photo.jpg")
    (label, percent), *others = answered(browser)
    assert label == expected["label"]
    assert percent == pytest.approx(100 * expected["probability"], abs=0.1)
    assert [share for _, share in others] == sorted((share for _, share in others), reverse=True)
    browser.wait_for("document.getElementById('status').textContent.startsWith('Decoding')")
    shares = "[...document.querySelectorAll('.bar')].map(bar => parseFloat(bar.style.width))"
    bars = browser.wait_for(f"(shares => shares[0] > 0 && shares)({shares})")
    assert bars[0] == pytest.approx(100 * expected["probability"], abs=0.1)
    assert browser.evaluate("document.getElementById('preview').naturalWidth") == 360
    assert browser.evaluate(_WIDTHS) == [width, width]  # nothing to scroll sideways
    background, ink = browser.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 60) == dark
    assert background != ink
    assert browser.complaints() == []
    assert {url.split("?")[0] for url in browser.requests() if url.startswith("http")} == {
        f"{server.address}/{name}" for name in ("", "classify.css", "classify.js", "card.json", "v1/classify")
    }
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_card_the_labels_and_the_reason_of_a_refusal_are_shown(server, browser, photo_bundle, tmp_path):
    browser.open(f"{server.address}/", headless_browser.DESK, dark=False)
    card = json.loads((photo_bundle / "model.json").read_text())
    browser.wait_for(f"document.title === {json.dumps(card['name'])}")
    assert browser.evaluate("document.querySelector('#labels p').textContent") == ", ".join(card["labels"])
    assert '"colour_order": "RGB"' in browser.evaluate("document.querySelector('#card pre').textContent")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    browser.choose_file("#file", tmp_path / "broken.jpg")
    shown = browser.wait_for("(s => s.classList.contains('wrong') && s.textContent)(document.getElementById('status'))")
    assert "cannot be read as an image" in shown


def test_the_cameras_picture_is_classified(server, browser):
    browser.open(f"{server.address}/", headless_browser.PHONE, dark=False)
    browser.wait_for("document.title !== 'Classify an image'")
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for("!document.getElementById('capture').hidden && document.getElementById('video').videoWidth > 0")
    browser.evaluate("document.getElementById('capture').click()")
    assert len(answered(browser)) == 5
    assert browser.evaluate("document.getElementById('video').hidden")

"""The page in real Chromium: drop, camera, offline, on a phone and on a desk, light and dark."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import headless_browser
import pytest

ANSWERS = """[...document.querySelectorAll('#answers li')].map(row =>
    [row.firstChild.textContent, Number(row.dataset.probability)])"""
ANSWERED = "document.querySelectorAll('#answers li').length"
READY = "document.body.dataset.ready"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[int]:
    """Any web server for static files."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def site(javascript, golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["node", javascript("browser") / "build.js", golden.bundle, folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def address(site) -> Iterator[str]:
    with serving(site) as port:
        yield f"http://127.0.0.1:{port}/"


def answer_to(browser, photo: Path) -> list:
    browser.evaluate("document.getElementById('answers').replaceChildren()")
    browser.choose_file("#file", photo)
    browser.wait_for(ANSWERED)
    return browser.evaluate(ANSWERS)


def check_golden(rows, golden):
    label, probability = rows[0]
    assert label == golden.label
    assert probability == pytest.approx(golden.probability, abs=1e-3)
    assert len(rows) == 5
    assert sum(share for _, share in rows) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["PHONE", "DESK"])
def test_the_golden_photo_gets_its_class(browser, address, golden, size, dark, tmp_path):
    width, height = getattr(headless_browser, size)
    browser.open(address, (width, height), dark=dark)
    browser.wait_for(READY)
    assert browser.evaluate("document.getElementById('model').textContent") == (
        "landscapes: 5 classes, 71.5 % right on test images"
    )
    check_golden(answer_to(browser, golden.photo), golden)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []
    assert all(url.startswith((address, "blob:")) for url in browser.requests())
    browser.screenshot(
        Path(os.environ.get("RKD_SCREENSHOTS", tmp_path)) / f"browser-{size}-{'dark' if dark else 'light'}.png"
    )


def test_every_kind_of_file_is_decoded_as_pillow_decodes_it(browser, address, variants):
    browser.open(address, headless_browser.DESK, dark=False)
    browser.wait_for(READY)
    for photo, (label, probability) in variants.items():
        assert answer_to(browser, photo)[0] == [label, pytest.approx(probability, abs=1e-5)], photo


def test_a_photo_can_be_dropped_and_one_that_is_none_is_refused(browser, address, golden):
    browser.open(address, headless_browser.DESK, dark=False)
    browser.wait_for(READY)
    drop = """fetch('{url}').then(answer => answer.blob()).then(blob => {{
        const data = new DataTransfer(); data.items.add(new File([blob], '{name}', {{type: blob.type}}));
        dispatchEvent(new DragEvent('dragenter', {{dataTransfer: data}}));
        const shown = getComputedStyle(document.getElementById('over')).display;
        dispatchEvent(new DragEvent('drop', {{dataTransfer: data, cancelable: true}})); return shown; }})"""
    encoded = base64.b64encode(golden.photo.read_bytes()).decode()
    assert browser.evaluate(drop.format(url=f"data:image/jpeg;base64,{encoded}", name="a.jpg")) == "grid"
    browser.wait_for(ANSWERED)
    check_golden(browser.evaluate(ANSWERS), golden)
    assert browser.evaluate("document.getElementById('photo').naturalWidth") > 100
    browser.evaluate(drop.format(url="data:text/plain,nothing", name="notes.txt"))
    said = browser.wait_for("!document.getElementById('error').hidden && document.getElementById('error').textContent")
    assert said.startswith("notes.txt cannot be classified")


def test_the_camera_is_classified_until_it_is_stopped(browser, address):
    browser.open(address, headless_browser.PHONE, dark=False)
    browser.wait_for(READY)
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for("document.querySelectorAll('#answers li').length === 5")
    assert browser.evaluate(
        "!document.getElementById('video').hidden && document.getElementById('video').videoWidth > 0"
    )
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for("document.getElementById('video').hidden")
    assert browser.evaluate("document.getElementById('video').srcObject.getTracks()[0].readyState") == "ended"


def test_after_the_first_visit_it_works_without_a_server(browser, site, golden):
    with serving(site) as port:
        browser.open(f"http://127.0.0.1:{port}/", headless_browser.DESK, dark=False)
        browser.wait_for(READY)
        browser.wait_for("document.getElementById('offline').textContent")
    browser.open(f"http://127.0.0.1:{port}/", headless_browser.DESK, dark=False)
    browser.wait_for(READY)
    check_golden(answer_to(browser, golden.photo), golden)


def test_a_model_that_takes_floats_is_refused_in_words(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    card = json.loads((site / "model.json").read_text())
    card["preprocess"]["embedded"] = False
    (tmp_path / "site/model.json").write_text(json.dumps(card))
    with serving(tmp_path / "site") as port:
        browser.open(f"http://127.0.0.1:{port}/", headless_browser.DESK, dark=False)
        said = browser.wait_for("document.getElementById('error').textContent")
    assert "export it with --input uint8" in said

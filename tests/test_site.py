"""The documentation site: its pages fit a phone, ask nobody for anything, and no link of it is broken unseen."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from headless_browser import DESK, PHONE

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "docs"))

import build_site  # noqa: E402
from site_links import broken_links  # noqa: E402

LARGEST = ("index.html", "tutorial.html", "method/equations.html", "reference/python.html", "results/ladder.html")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The tests' own requests are no news."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The site, built as `.ci/run` builds it where that has not been done, and a server of it."""
    if not (build_site.SITE / "index.html").is_file():
        subprocess.run([sys.executable, REPO / "docs/build_site.py"], check=True, capture_output=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=build_site.SITE)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("page", LARGEST)
@pytest.mark.parametrize(("size", "dark"), [(PHONE, True), (DESK, False)], ids=["phone", "desk"])
def test_a_page_fits_its_window_and_asks_nobody_else(browser, address, page, size, dark):
    browser.open(f"{address}/{page}", size, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (max(colour) < 100) == dark
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith((address, "data:", "blob:"))] == []


def test_equations_are_set_without_a_script(browser, address):
    browser.open(f"{address}/method/equations.html", DESK, dark=False)
    assert browser.evaluate("document.querySelectorAll('.equation math').length") > 5
    rows = "document.querySelector('.equation math').getBoundingClientRect().height"
    assert browser.evaluate(rows) > 40  # two lines, one below the other


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ('<a href="other.html">', "other.html is not there"),
        ('<a href="#nowhere">', "#nowhere: no such anchor"),
        ('<a href="page.html#nowhere">', "page.html#nowhere: no such anchor"),
        ('<img src="https://example.org/a.png">', "loads https://example.org/a.png from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css from elsewhere"),
        ('<a href="https://exam ple">', "https://exam ple is no address"),
        ('<p id="here"><a href="page.html#here"><a href="https://example.org"><a href="/page.html">', None),
    ],
)
def test_a_broken_link_is_noticed(tmp_path, body, wrong):
    (tmp_path / "page.html").write_text(body)
    expected = [] if wrong is None else [f"page.html: {wrong}"]
    assert [line for line in broken_links(tmp_path) if "// is" not in line][:1] == expected


def test_a_page_without_a_place_in_the_navigation_is_noticed(tmp_path):
    for name in ("guides/a.md", "guides/b.md", "files/c.py.md"):
        (tmp_path / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pages" / name).write_text("# A page")
    (tmp_path / "zensical.toml").write_text('nav = [{ "A" = "guides/a.md" }]')
    assert build_site.without_a_place(tmp_path) == ["guides/b.md"]


def test_a_link_out_of_the_docs_becomes_a_page_that_shows_the_file(tmp_path):
    staging = build_site.Staging(tmp_path)
    text = staging.page(
        "docs/guides/a.md", "guides/a.md", "[x](../../rkd_deploy/cli.py) `[y](z)`\n```\n[no](link)\n```\n"
    )
    assert text.startswith("[x](../files/rkd_deploy/cli.py.md)")
    assert "[no](link)" in text
    assert "```" in (tmp_path / "files/rkd_deploy/cli.py.md").read_text()
    with pytest.raises(SystemExit, match=r"docs/guides/a\.md: nothing\.md leads to docs/guides/nothing\.md"):
        staging.link("docs/guides/a.md", "guides/a.md", "nothing.md")

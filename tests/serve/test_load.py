"""benchmarks/serving_load.py: every answer is held to what a right one has, and requests come when they are due."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("serving_load")
    del sys.modules["serving_load"]


def test_right_answers_are_counted_and_wrong_ones_kept(load, server, photo, expected):
    right = load.HttpRequest.post("/v1/classify", photo, b'"label": "%s"' % expected["label"].encode())
    logits = load.HttpRequest.infer("tiny-s-a", [1], photo, b'"logits"')
    good = load.send_load(server.place, [right, logits], 3, 0.5)
    assert good.wrong == []
    assert len(good.milliseconds) >= 6
    assert good.rate == pytest.approx(len(good.milliseconds) / good.seconds)
    other = load.HttpRequest(right.wire, b"a label that no model has")
    refused = load.HttpRequest.post("/v1/classify", b"no image", b"error")
    bad = load.send_load(server.place, [other, right, refused], 1, 0.3)
    assert len(bad.milliseconds) * 2 / 3 - 1 <= len(bad.wrong) <= len(bad.milliseconds) * 2 / 3 + 1
    assert {answer[:12] for answer in bad.wrong} == {b"HTTP/1.1 200", b"HTTP/1.1 400"}


def test_a_rate_is_kept_where_the_server_is_faster(load, server, photo):
    request = load.HttpRequest.post("/v1/classify", photo, b"predictions")
    paced = load.send_load(server.place, [request], 4, 1.0, rate=10)
    assert len(paced.milliseconds) == 10
    assert paced.seconds >= 0.9  # the tenth is due then


def test_a_connection_that_is_closed_under_a_request_is_an_error(load):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.recv(10)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(OSError, match=r"closed the connection|reset"):
            load.send_load(listening.getsockname()[:2], [load.HttpRequest.post("/", b"", b"")], 1, 5)
        thread.join()

"""The application without a socket: what a request that takes too long holds, and what its failure is worth."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from rkd_deploy.errors import BackendError
from rkd_deploy.serve.http.app import create_app
from rkd_deploy.serve.http.model import Reply, ServedModel
from rkd_deploy.serve.http.settings import Limits

PATIENCE_S = 30


@dataclass(frozen=True)
class Answer:
    """Status and JSON of an answer."""

    status: int
    json: Any


async def ask(app: Any, path: str = "/v1/classify", method: str = "POST") -> Answer:
    """One request straight to an ASGI application."""
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"image", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return Answer(sent[0]["status"], json.loads(b"".join(part.get("body", b"") for part in sent[1:])))


async def until_answered(app: Any, status: int) -> Answer:
    """The first answer of this status."""
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await ask(app)).status != status:
            await asyncio.sleep(0.01)
    return answer


def test_the_place_of_a_request_that_was_given_up_is_free_when_its_thread_has_ended(photo_bundle, monkeypatch):
    released, ended = threading.Event(), []

    def slow(model: ServedModel, body: bytes, top: int) -> Reply:
        released.wait(PATIENCE_S)
        ended.append(body)
        return Reply({"top": top}, {}, {"decode": 0.0, "inference": 0.0})

    app = create_app(photo_bundle, Limits(requests=1, seconds=0.2), threads=1)  # its warm-up is the real one
    monkeypatch.setattr(ServedModel, "classify", slow)

    async def story() -> None:
        late = await ask(app)
        assert (late.status, late.json) == (503, {"error": "There was no answer after 0.2 s. Try again later."})
        full = await ask(app)  # nobody waits for the first any more, but its thread is still at it
        assert full.json == {"error": "All 1 places for requests are taken. Try again later."}
        assert (await ask(app, "/v2/health/ready", "GET")).status == 200
        assert not ended
        released.set()
        assert (await until_answered(app, 200)).json == {"top": 5}
        assert len(ended) == 2  # what was refused had no thread

    asyncio.run(story())


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (BackendError("it broke"), 500, "it broke"),
        (MemoryError("none left"), 500, "The server failed; its log says why."),
    ],
)
def test_a_failure_in_the_thread_is_the_answer_and_frees_the_place(photo_bundle, monkeypatch, failure, status, words):
    def fail(model: ServedModel, body: bytes, top: int) -> Reply:
        raise failure

    app = create_app(photo_bundle, Limits(requests=1), threads=1)
    monkeypatch.setattr(ServedModel, "classify", fail)

    async def story() -> None:
        for _ in range(3):
            try:
                answer = await ask(app)
            except MemoryError:  # Starlette raises it again behind its answer, for the server's log
                continue
            assert (answer.status, answer.json["error"]) == (status, words)

    asyncio.run(story())

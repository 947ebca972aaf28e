"""Answers requests as an ASGI application: addresses, limits, errors, metrics."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkd_deploy.errors import DataError, RkdError, UsageError, installed_version
from rkd_deploy.serve.classifier import Classifier, load
from rkd_deploy.serve.http.metrics import Metrics, SharedCounts
from rkd_deploy.serve.http.model import Reply, ServedModel
from rkd_deploy.serve.http.openapi import describe
from rkd_deploy.serve.http.protocol import EXTENSIONS, HEADER_LENGTH, VERSION
from rkd_deploy.serve.http.settings import Limits

PAGE = Path(__file__).with_name("page")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'"
RETRY_AFTER = "1"


def create_app(
    model: str | os.PathLike[str],
    limits: Limits | None = None,
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    threads: int | None = None,
    counts: SharedCounts | None = None,
) -> Starlette:
    """Load a model, and give the application that answers with it.

    The model is loaded here, once for each process, so that a server that listens is ready.

    Args:
        model: Bundle folder, or an ONNX file with a card.
        limits: What a request may cost.
        backend: As for `load_backend`.
        device: As for `load_backend`.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        counts: Memory of the metrics that several workers share.

    Raises:
        RkdError: As `rkd_deploy.load` raises them.
    """
    limits = limits or Limits()
    classifier = load(model, backend=backend, device=device, threads=threads, max_batch=limits.batch)
    return _Application(classifier, limits, (counts or SharedCounts()).claim()).asgi()


class _Application:
    """The handlers of one process, and what they share."""

    def __init__(self, classifier: Classifier, limits: Limits, metrics: Metrics) -> None:
        self._model, self._limits, self._metrics = ServedModel(classifier, limits), limits, metrics
        self._card = json.loads(classifier.card.to_json())
        # Decoders and runtimes leave the interpreter's lock: as many requests run at once as there are cores, and the
        # others wait in the pool, of which `limits.requests` is the bound.
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="model")
        self._running = 0
        self._model.warm_up()
        interface, version = self._model.interface, installed_version("rkd-deploy") or "unknown"
        self._documents: dict[str, Any] = {
            "/v2": {"name": "rkd-deploy", "version": version, "extensions": list(EXTENSIONS)},
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
            "/openapi.json": describe(interface, limits, version),
            "/card.json": self._card,
        }
        for name in (f"/v2/models/{interface.model}", f"/v2/models/{interface.model}/versions/{VERSION}"):
            self._documents |= {name: interface.metadata(), f"{name}/ready": {"name": interface.model, "ready": True}}

    def asgi(self) -> Starlette:
        """The addresses, with what becomes of errors."""
        name = self._model.interface.model
        documents = [Route(path, partial(self._document, path), methods=["GET"]) for path in self._documents]
        infer = [
            Route(f"/v2/models/{name}{version}/infer", _Posted(self._infer), methods=["POST"])
            for version in ("", f"/versions/{VERSION}")
        ]
        pages = [Route(path, partial(_page, *file), methods=["GET"]) for path, file in _page_files().items()]
        app = Starlette(
            middleware=[Middleware(_Counting, metrics=self._metrics)],
            routes=[
                Route("/v1/classify", _Posted(self._classify), methods=["POST"]),
                Route("/metrics", self._show_metrics, methods=["GET"]),
                *documents,
                *infer,
                *pages,
            ],
            exception_handlers={HTTPException: _http_error, RkdError: _refusal, Exception: _failure},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._threads.shutdown()
        self._model.classifier.close()

    async def _document(self, path: str, request: Request) -> Response:
        return _json(self._documents[path])

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _classify(self, scope: Scope, receive: Receive) -> Response:
        query = QueryParams(scope["query_string"]) if scope["query_string"] else {}
        text = query.get("top", "5")
        if not text.isdecimal() or not 1 <= len(text) <= 9 or int(text) < 1:
            raise UsageError(f"top is {text[:20]!r}; it must be how many classes, from 1.")
        return await self._run(scope, receive, lambda body: self._model.classify(body, int(text)))

    async def _infer(self, scope: Scope, receive: Receive) -> Response:
        header_length = _header(scope, HEADER_LENGTH)
        return await self._run(scope, receive, lambda body: self._model.infer(body, header_length))

    async def _run(self, scope: Scope, receive: Receive, work: Callable[[bytes], Reply]) -> Response:
        """Read the body and let a thread work on it; a place is taken before a byte is read."""
        if self._running >= self._limits.requests:
            raise _overloaded(f"All {self._limits.requests} places for requests are taken")
        self._running += 1
        waiting: asyncio.Future[Reply] | None = None
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await self._body(scope, receive)
                waiting = asyncio.get_running_loop().create_future()
                self._threads.submit(self._work, work, body, waiting)
                reply = await waiting
        except TimeoutError as error:
            if waiting is None:
                late = f"The request was not here after {self._limits.seconds:g} s."
                raise HTTPException(408, late, {"connection": "close"}) from error
            raise _overloaded(f"There was no answer after {self._limits.seconds:g} s") from error
        finally:
            if waiting is None:
                self._running -= 1
        for name, seconds in reply.seconds.items():
            self._metrics.observe(name, seconds)
        if isinstance(reply.body, dict):
            return _json(reply.body, headers=reply.headers)
        return Response(reply.body, headers=reply.headers)

    def _work(self, work: Callable[[bytes], Reply], body: bytes, waiting: asyncio.Future[Reply]) -> None:
        """Run in a thread of the pool, which hands the outcome to the event loop.

        In one step: `loop.run_in_executor` under a `shield` takes two futures more, and 40 us of each request.
        """
        reply: Reply | None = None
        failure: BaseException | None = None
        try:
            reply = work(body)
        except BaseException as error:
            failure = error
        waiting.get_loop().call_soon_threadsafe(self._finish, waiting, reply, failure)

    def _finish(self, waiting: asyncio.Future[Reply], reply: Reply | None, failure: BaseException | None) -> None:
        # A thread cannot be stopped: its place is free when it has ended, not when its client gives up.
        self._running -= 1
        if waiting.done():  # given up
            return
        if failure is not None:
            waiting.set_exception(failure)
        elif reply is not None:
            waiting.set_result(reply)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, no byte more than the limit.

        Raises:
            HTTPException: 413, it is too large; 415, it is compressed.
            ClientDisconnect: The client left.
        """
        limit = self._limits.body
        if (_header(scope, "content-encoding") or "identity") != "identity":
            raise HTTPException(415, "Compressed requests are not taken: send the body as it is.")
        with suppress(ValueError):
            if int(_header(scope, "content-length") or "0") > limit:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes. Send less, or raise --max-body.")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > limit:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes. Send less, or raise --max-body.")
            parts.append(part)
        return b"".join(parts)


class _Posted:
    """An endpoint that takes ASGI's messages as they come, which is a third less than through Starlette's Request."""

    def __init__(self, answer: Callable[[Scope, Receive], Awaitable[Response]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(scope, receive)
        await response(scope, receive, send)


class _Counting:
    """Middleware that counts every request by its endpoint and code, and times it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, code, path = perf_counter(), 500, scope["path"]
        endpoint = "infer" if path.endswith("/infer") else "classify" if path == "/v1/classify" else "other"

        async def observe(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except ClientDisconnect:  # it left while its body was read: there is nobody to answer
            code = 499
        finally:
            self._metrics.count(endpoint, code)
            if endpoint != "other":
                self._metrics.observe("request", perf_counter() - start)


def _header(scope: Scope, name: str) -> str | None:
    """Value of a header, of the first where it comes twice."""
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), None)


def _page_files() -> dict[str, tuple[str, bytes]]:
    """Media type and content of each file of the page, read once: no address is ever a path on the disk."""
    files = {f"/{file.name}": (_KINDS[file.suffix], file.read_bytes()) for file in sorted(PAGE.iterdir())}
    return {"/": files.pop("/index.html"), **files}


async def _page(kind: str, content: bytes, request: Request) -> Response:
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return Response(content, media_type=kind, headers=headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def _overloaded(what: str) -> HTTPException:
    return HTTPException(503, f"{what}. Try again later.", {"retry-after": RETRY_AFTER})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code in (404, 405):
        detail = f"There is no {request.method} {request.url.path[:200]} here. /openapi.json lists what there is."
    return _json({"error": detail}, error.status_code, dict(error.headers or {}))


async def _refusal(request: Request, error: Exception) -> Response:
    """What is wrong with the request is the client's to read; what failed here is the server's."""
    return _json({"error": str(error)}, 400 if isinstance(error, UsageError | DataError) else 500)


async def _failure(request: Request, error: Exception) -> Response:
    return _json({"error": "The server failed; its log says why."}, 500)

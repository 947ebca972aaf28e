"""Sends requests over kept HTTP connections, one after the other or at a given rate, and checks every answer.

One thread and one selector, and requests put together beforehand: what it costs is small, and the same for every
server.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

PATIENCE_S = 60.0
_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length: "


@dataclass(frozen=True)
class HttpRequest:
    """A request as it goes over the wire, and what a right answer to it holds."""

    wire: bytes
    right: bytes

    @classmethod
    def post(cls, path: str, body: bytes, right: bytes, headers: dict[str, str] | None = None) -> HttpRequest:
        """A POST of a body."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
        return cls(head.encode() + body, right)

    @classmethod
    def infer(cls, model: str, shape: list[int], photo: bytes, right: bytes) -> HttpRequest:
        """An encoded image as BYTES, the logits back as bytes: tritonclient's usual way."""
        element = struct.pack("<I", len(photo)) + photo
        tensor = {
            "name": "input",
            "shape": shape,
            "datatype": "BYTES",
            "parameters": {"binary_data_size": len(element)},
        }
        logits = {"name": "logits", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [logits]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return cls.post(f"/v2/models/{model}/infer", head + element, right, headers)


@dataclass(frozen=True)
class Load:
    """What came of it.

    Attributes:
        seconds: From the first request to the last answer.
        milliseconds: Of each request: until its answer was whole, from when it was sent, or was to be sent.
        wrong: Answers with another status, or without what a right one holds.
        cpu_seconds: That the serving side took of its cores meanwhile.
    """

    seconds: float
    milliseconds: list[float]
    wrong: list[bytes]
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.milliseconds) / self.seconds

    @property
    def cpu_milliseconds(self) -> float:
        """Of a core, for a request."""
        return 1000 * self.cpu_seconds / len(self.milliseconds)


class _Connection:
    """A connection and the request that is on its way over it."""

    def __init__(self, place: tuple[str, int]) -> None:
        self.socket = socket.create_connection(place, timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request, self.since, self._answer = HttpRequest(b"", b""), 0.0, b""

    def close(self) -> None:
        self.socket.close()

    def send(self, request: HttpRequest, since: float) -> None:
        self.request, self.since, self._answer = request, since, b""
        self.socket.sendall(request.wire)

    def read(self) -> bytes | None:
        """The answer, once it is whole."""
        part = self.socket.recv(1 << 16)
        if not part:
            raise ConnectionError(f"The server closed the connection under a request: {self._answer[:200]!r}")
        self._answer += part
        head, end, body = self._answer.partition(_HEAD_END)
        length = head.lower().find(_LENGTH)
        if not end or len(body) < int(head[length + len(_LENGTH) :].split(b"\r\n", 1)[0]):
            return None
        return self._answer


def send_load(
    place: tuple[str, int],
    requests: Sequence[HttpRequest],
    clients: int,
    seconds: float,
    rate: float | None = None,
) -> Load:
    """Ask for some time; what was asked is waited for.

    Args:
        place: Host and port.
        requests: Sent in turn.
        clients: Connections, each with one request at a time.
        seconds: How long.
        rate: Requests per second; a request that is sent late, because all connections wait, counts from when it was
            due. Default: as many as are answered.

    Raises:
        OSError: The server closed a connection, or did not answer for a minute.
    """
    with ExitStack() as opened:
        selector = opened.enter_context(selectors.DefaultSelector())
        idle = deque(opened.enter_context(closing(_Connection(place))) for _ in range(clients))
        for connection in idle:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        return _sent(selector, idle, requests, seconds, rate)


def _sent(
    selector: selectors.BaseSelector,
    idle: deque[_Connection],
    requests: Sequence[HttpRequest],
    seconds: float,
    rate: float | None,
) -> Load:
    clients, milliseconds = len(idle), list[float]()
    wrong: list[bytes] = []
    sent, begin = 0, time.perf_counter()
    while True:
        now, due = time.perf_counter(), 0.0
        while idle and now < begin + seconds:
            due = now if rate is None else begin + sent / rate
            if due > now:
                break
            idle.popleft().send(requests[sent % len(requests)], due)
            sent += 1
            now = time.perf_counter()
        if len(idle) == clients and now >= begin + seconds:
            break
        wait = due - now if idle and due > now else PATIENCE_S
        ready = selector.select(wait)
        if not ready and wait == PATIENCE_S:
            raise TimeoutError(f"No answer for {PATIENCE_S:g} s")
        for key, _ in ready:
            connection = key.data
            answer = connection.read()
            if answer is not None:
                milliseconds.append(1000 * (time.perf_counter() - connection.since))
                if not answer.startswith(b"HTTP/1.1 200") or connection.request.right not in answer:
                    wrong.append(answer)
                idle.append(connection)
    return Load(time.perf_counter() - begin, milliseconds, wrong)

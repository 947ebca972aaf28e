"""Real servers of the package: a process each, on a port that is free."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 60
COMMAND = (sys.executable, "-m", "rkd_deploy.cli")


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A server that answers: its process, its address, its log."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def place(self) -> tuple[str, int]:
        parts = urlsplit(self.address)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Answer:
        """The answer to one request, on a connection of its own."""
        connection = http.client.HTTPConnection(*self.place, timeout=PATIENCE_S)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            found = connection.getresponse()
            return Answer(found.status, {key.lower(): value for key, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def ready(self) -> bool:
        try:
            return self.ask("/v2/health/ready").status == 200
        except (OSError, http.client.HTTPException):
            return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(
    bundle: Path, folder: Path, *options: object, command: Sequence[object] = COMMAND, packages: Path | None = None
) -> Iterator[Running]:
    """A server of a bundle until the block ends, ready when it begins; it finds packages in that folder too."""
    log = folder / "server.log"
    command = [*command, "serve", bundle, "--port", 0, "--threads", 1, "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, log.read_text()
            server = Running(process, json.loads(line)["address"], log)
            end = time.monotonic() + PATIENCE_S
            while not server.ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, f"not ready after {PATIENCE_S} s: {log.read_text()}"
                time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()

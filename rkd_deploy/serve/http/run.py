"""Runs the application under uvicorn: in this process, or in several workers."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.errors import BackendError, RkdError, require
from rkd_deploy.fields import check_number
from rkd_deploy.serve.http.app import create_app
from rkd_deploy.serve.http.metrics import SharedCounts
from rkd_deploy.serve.http.settings import Limits

KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep an idle connection: so that they close it, and never we under a request."""
_STARTUP_FAILURE = 3  # uvicorn's: a worker that ends with it is not started again


@dataclass(frozen=True, kw_only=True)
class Server:
    """A model, and where it is to answer.

    Attributes:
        model: Bundle folder, or an ONNX file with a card.
        host: Address to listen on; one that others can reach lets anybody there in.
        port: 0: any free one.
        workers: Processes; each loads the model.
        limits: What a request may cost.
        backend: As for `load_backend`.
        device: As for `load_backend`.
        threads: Threads inside one operator on a CPU. Default: the runtime's choice; a fair share of the cores for each
            of several workers.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    backend: str = "onnxruntime"
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        check_number("--port", self.port, 0, 65_535, whole=True)
        check_number("--workers", self.workers, 1, 256, whole=True)

    def run(self, started: Callable[[str], None]) -> None:
        """Answer until SIGINT or SIGTERM; then what was accepted is answered before this returns.

        Args:
            started: Called with the address, once the socket is bound; connections are accepted when the model is
                loaded.

        Raises:
            RkdError: The model cannot be loaded, or the address cannot be had.
            MissingDependencyError: The extra `serve` is not installed.
        """
        uvicorn = require("uvicorn", "serve")
        options = {
            "lifespan": "on",
            "ws": "none",
            # Uvicorn's own set-up closes every logging handler of the process, and absl's closes the stream behind it.
            "log_config": None,
            "log_level": "warning",
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": int(self.limits.seconds) + 5,
        }
        if self.workers == 1:
            # Loaded before there is an address, so that what is wrong with the model is said here.
            config = uvicorn.Config(self._app(None), **options)
            with self._bound() as listening:
                started(_address(listening))
                _until_stopped(lambda: uvicorn.Server(config).run(sockets=[listening]))
            return
        from uvicorn.supervisors import Multiprocess

        self._app(None)  # the same in each worker, which could only end
        app = functools.partial(_load_in_worker, self, SharedCounts())
        config = uvicorn.Config(app, factory=True, workers=self.workers, **options)
        with self._bound() as listening:
            started(_address(listening))
            _until_stopped(Multiprocess(config, sockets=[listening]).run)

    def _app(self, counts: SharedCounts | None) -> Any:
        threads = self.threads
        if threads is None and self.workers > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        return create_app(
            self.model, self.limits, backend=self.backend, device=self.device, threads=threads, counts=counts
        )

    def _bound(self) -> socket.socket:
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            # asyncio turns Nagle's algorithm off only where the protocol is named: else every answer waits for 40 ms.
            listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listening.bind((self.host, self.port))
            except OSError:
                listening.close()
                raise
        except OSError as error:
            raise BackendError(
                f"{self.host}:{self.port} cannot be listened on: {error.strerror or error}. Give another --port (0: "
                "any free one), or another --host of this machine."
            ) from error
        listening.set_inheritable(True)
        return listening


def _load_in_worker(server: Server, counts: SharedCounts) -> Any:
    try:
        return server._app(counts)
    except RkdError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(_STARTUP_FAILURE)


def _until_stopped(run: Callable[[], None]) -> None:
    """Run a server; the signal that ended it, which uvicorn raises again once all is answered, is no error."""
    with contextlib.suppress(KeyboardInterrupt):
        run()


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

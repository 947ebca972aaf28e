"""The command serve: answers over HTTP with a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rkd_deploy.commands.options import (
    RUNS,
    BackendName,
    DeviceName,
    Json,
    Newest,
    Root,
    Threads,
    newest_bundle,
    print_json,
    require_all,
)
from rkd_deploy.commands.settings import SettingsOptions, with_settings
from rkd_deploy.text import visible

if TYPE_CHECKING:
    from rkd_deploy.serve.http.settings import Limits

LIMITS = "What a request may cost"


def _settings() -> dict[str, tuple[type, str]]:
    from rkd_deploy.serve.http.settings import Limits

    return {"limits": (Limits, LIMITS)}


@with_settings(_settings)
def serve(
    model: Newest = None,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 lets other machines in, all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any free one.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", help="Processes; each loads the model.")] = 1,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    threads: Threads = None,
    root: Root = RUNS,
    as_json: Json = False,
    *,
    limits: SettingsOptions[Limits],
) -> None:
    """Answer over HTTP: a page, POST /v1/classify, and the Open Inference Protocol.

    Runs until Ctrl-C or SIGTERM, and answers what it has accepted before it ends, with exit code 0.
    """
    require_all("serve", "starlette", "uvicorn")
    from rkd_deploy.serve.http.run import Server

    bundle = model or newest_bundle(root)
    server = Server(
        model=bundle,
        host=host,
        port=port,
        workers=workers,
        limits=limits.make(),
        backend=backend,
        device=device,
        threads=threads,
    )

    def started(address: str) -> None:
        typer.echo(visible(f"Serving {bundle} at {address} (Ctrl-C ends it)."), err=as_json)
        if as_json:
            print_json({"bundle": str(bundle), "address": address, "workers": workers})

    server.run(started)

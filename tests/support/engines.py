"""Ray Serve and BentoML as real servers of this package's application, in an environment that uv makes once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from real_servers import Running, free_port

REPO = Path(__file__).parents[2]
SERVE = REPO / "serve"
UV = shutil.which("uv") or "uv"
NAMES = ("ray", "bentoml")
PACKAGES = ("ray[serve]==2.60.0", "bentoml==1.4.40", "onnxruntime==1.32.0", "pillow==13.0.0", "numpy", "typer", "httpx")
START_S = 240

RAY = """
import sys, ray
from ray import serve
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
import ray_app
serve.run(ray_app.app, blocking=True)
"""


def environment() -> Path:
    """The Python of an environment with both, made if it is not there yet.

    Raises:
        OSError: There is no uv, or the folder cannot be written.
        subprocess.CalledProcessError: A package cannot be had.
    """
    folder = REPO / ".data" / f"engines-{sys.version_info.minor}"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        for command in (
            ["venv", "--clear", "--python", sys.executable, folder],
            ["pip", "install", "--python", python, *PACKAGES],
        ):
            # Not in the checkout, whose pins are for another environment.
            subprocess.run([UV, *command], cwd="/", check=True, capture_output=True, text=True)
        (folder / ".ready").touch()
    return python


def httptools_folder() -> Path:
    """A folder with httptools, by which uvicorn reads HTTP where it is installed; made once.

    Raises:
        OSError: There is no uv, or the folder cannot be written.
        subprocess.CalledProcessError: A package cannot be had.
    """
    folder = REPO / ".data" / f"httptools-{sys.version_info.minor}"
    if not (folder / ".ready").exists():
        command = [UV, "pip", "install", "--python", sys.executable, "--target", folder, "httptools==0.9.0"]
        subprocess.run(command, cwd="/", check=True, capture_output=True, text=True)
        (folder / ".ready").touch()
    return folder


@contextmanager
def engine(name: str, python: Path, bundle: Path, log: Path) -> Iterator[Running]:
    """One of `NAMES` with serve/'s file for it, ready when the block begins; its processes end with the block."""
    port = free_port()
    arguments = {
        "ray": ["-c", RAY, port],
        "bentoml": ["-m", "bentoml", "serve", "bento:Classifier", "--host", "127.0.0.1", "--port", port],
    }[name]
    short = tempfile.mkdtemp(prefix="rkd-")  # Ray puts sockets there, whose names may not be long
    environment = {
        "BUNDLE": str(bundle), "PYTHONPATH": f"{REPO}{os.pathsep}{SERVE}",
        "PATH": f"{python.parent}{os.pathsep}{os.defpath}",
        "HOME": short, "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # tests run under uv run, this script does not
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": short, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [python, *map(str, arguments)], cwd=SERVE, env=environment, stdout=stream, stderr=stream, text=True
        )
    try:
        server = Running(process, f"http://127.0.0.1:{port}", log)
        end = time.monotonic() + START_S
        while not server.ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield server
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it died: its log is the error above
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, 20)
        for left_over in alive:
            left_over.kill()
        process.wait(20)
        shutil.rmtree(short, ignore_errors=True)

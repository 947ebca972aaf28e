"""A real tritonserver: the binary of the nvidia-pytriton wheel in its own environment.

Its own, because the server's python backend needs numpy below 2, and its client a protobuf and an ml-dtypes older than
what everything else here uses. Made once by uv, under .data/, which git ignores.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
UV = shutil.which("uv") or "uv"
CLIENT = REPO / "tests/serve/triton/client.py"
PACKAGES = (
    "numpy==1.26.4",
    "pillow==13.0.0",
    "onnxruntime==1.32.0",
    "tritonclient[grpc,http]==2.73.0",
    "protobuf==6.33.6",
)
SERVER = "nvidia-pytriton==0.7.0"  # Triton 2.51, with the python backend and no other


@dataclass(frozen=True)
class Address:
    """A server that runs, and its log."""

    grpc: str
    http: str
    log: Path
    process: subprocess.Popen[bytes]


class Triton:
    """The environment: its Python for clients, its binary for servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv/bin/python"
        self.script = CLIENT

    def client(self, *arguments: object) -> str:
        """What tests/serve/triton/client.py prints."""
        ran = subprocess.run(
            [self.python, self.script, *map(str, arguments)], capture_output=True, text=True, timeout=90
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    @contextmanager
    def server(self, repository: Path, log: Path) -> Iterator[Address]:
        """A tritonserver that polls a repository each second; every process of it is ended with the block."""
        with socket.socket() as probe, socket.socket() as other:
            for free in (probe, other):
                free.bind(("127.0.0.1", 0))
            port, http_port = probe.getsockname()[1], other.getsockname()[1]
        site = next((self.folder / "venv/lib").glob("python*/site-packages"))
        base = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        memory = f"rkd_triton_{os.getpid()}_{port}_"
        command = [
            site / "pytriton/tritonserver/bin/tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={self.folder / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={memory}",
            "--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-metrics=false",
            "--http-address=127.0.0.1", f"--http-port={http_port}",
            "--model-control-mode=poll", "--repository-poll-secs=1", "--exit-timeout-secs=5",
        ]  # fmt: skip
        environment = {
            "HOME": os.environ.get("HOME", "/"),
            "PATH": f"{self.python.parent}{os.pathsep}{os.defpath}",  # the backend finds its packages by this `python`
            "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}{os.pathsep}{base}",
        }
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield Address(f"127.0.0.1:{port}", f"127.0.0.1:{http_port}", log, process)
        finally:
            _end(process)
            for left_over in Path("/dev/shm").glob(f"{memory}*"):
                left_over.unlink()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):  # where the server crashed, its stubs live on and ignore SIGTERM
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(50):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of the tritonserver {process.pid} live on")


def environment() -> Triton:
    """The environment, made if it is not there yet.

    Raises:
        OSError: There is no uv, or the folder cannot be written.
        subprocess.CalledProcessError: A package cannot be had.
    """
    version = f"3.{min(sys.version_info.minor, 12)}"  # numpy 1.26 ends there
    key = hashlib.sha256("\n".join((*PACKAGES, SERVER, version, sys.base_prefix)).encode()).hexdigest()[:12]
    folder = REPO / ".data" / f"triton-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes at once make it once
        if not (folder / ".ready").exists():
            _install(folder, version)
            (folder / ".ready").touch()
    return Triton(folder)


def _install(folder: Path, version: str) -> None:
    shutil.rmtree(folder / "venv", ignore_errors=True)  # of a run that was killed here
    python = folder / "venv/bin/python"
    same = version == f"{sys.version_info.major}.{sys.version_info.minor}"
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    for command in (
        ["venv", "--python", sys.executable if same else version, folder / "venv"],
        ["pip", "install", "--python", python, *PACKAGES],
        ["pip", "install", "--no-deps", "--python", python, SERVER],  # the binary, without what PyTriton itself needs
    ):
        # Not in the checkout, whose pins are for another environment.
        subprocess.run([UV, *command], cwd="/", env=environment, check=True, capture_output=True, text=True)
    parts = next((folder / "venv/lib").glob("python*/site-packages")) / "pytriton/tritonserver"
    shutil.copytree(parts / "backends", folder / "backends", dirs_exist_ok=True)
    shutil.copy2(parts / f"python_backend_stubs/{version}/triton_python_backend_stub", folder / "backends/python")

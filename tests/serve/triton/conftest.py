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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from rkd_deploy.backends.tensorrt.record import EngineRecord, write_engine
from rkd_deploy.backends.tensorrt.settings import Profile
from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent

REPO = Path(__file__).parents[3]
UV = shutil.which("uv") or "uv"
CLIENT = Path(__file__).with_name("client.py")
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
            yield Address(f"127.0.0.1:{port}", f"127.0.0.1:{http_port}", log)
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


@pytest.fixture(scope="session")
def triton(absent: Callable[[str], NoReturn]) -> Triton:
    """The environment, made if it is not there yet."""
    version = f"3.{min(sys.version_info.minor, 12)}"  # numpy 1.26 ends there
    key = hashlib.sha256("\n".join((*PACKAGES, SERVER, version, sys.base_prefix)).encode()).hexdigest()[:12]
    folder = REPO / ".data" / f"triton-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes at once make it once
        if not (folder / ".ready").exists():
            try:
                _install(folder, version)
            except (OSError, subprocess.CalledProcessError) as error:
                absent(f"no tritonserver: {error}: {getattr(error, 'stderr', '')}")
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


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of S + A that take and answer the same, with other weights; read only."""
    preprocess = Preprocess(height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    card = ModelCard(name="tiny S + A", labels=("ant", "bee", "cat", "dog", "elk"), preprocess=preprocess)
    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        branches = [CifarResNet(8, widths, None) for widths in ((8, 8, 16, 24), (8, 8, 8, 8))]
        model = ResidualStudent(branches[0], branches[1:], channels=12, num_classes=len(card.labels))
        for parameter in model.parameters():
            parameter.data.uniform_(-0.4, 0.4)
        export_bundle(model.eval(), card, folder / name)
    return folder / "first", folder / "second"


@pytest.fixture
def with_plan(bundles: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the first bundle with a plan in it, as `rkd-deploy export --format tensorrt` records it."""

    def make(*profiles: Profile) -> Path:
        folder = shutil.copytree(bundles[0], tmp_path / "planned")
        source = read_source(folder)
        record = EngineRecord(
            library="tensorrt", version="10.9.0.34", device="NVIDIA H200", compute_capability="9.0",
            compute_capabilities=(), driver=12080, profiles=profiles, precision="fp32", settings={},
            onnx_name="model.onnx", onnx_sha256=source.sha256, engine_bytes=4, build_seconds=1.0,
            engine_sha256=hashlib.sha256(b"plan").hexdigest(),
        )  # fmt: skip
        write_engine(folder / "model.tensorrt.engine", b"plan", record)
        return folder

    return make

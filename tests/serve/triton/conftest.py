"""A real tritonserver, and two bundles for it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import tritonserver

from rkd_deploy.backends.tensorrt.record import EngineRecord, write_engine
from rkd_deploy.backends.tensorrt.settings import Profile
from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent


@pytest.fixture(scope="session")
def triton(absent: Callable[[str], NoReturn]) -> tritonserver.Triton:
    """Its environment, made if it is not there yet."""
    try:
        return tritonserver.environment()
    except (OSError, subprocess.CalledProcessError) as error:
        absent(f"no tritonserver: {error}: {getattr(error, 'stderr', '')}")


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

"""A real tritonserver, and two bundles for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import tritonserver

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

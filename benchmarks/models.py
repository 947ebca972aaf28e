"""The model that benches of our own tools are run on."""

from __future__ import annotations

from pathlib import Path


def resnet20(folder: Path) -> Path:
    """A bundle of a ResNet-20 for CIFAR-100 with random weights."""
    import torch

    from rkd_deploy.card import ModelCard, Preprocess
    from rkd_deploy.export.bundle import export_bundle
    from rkd_deploy.models import zoo

    torch.manual_seed(0)
    preprocess = Preprocess(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    card = ModelCard(name="resnet20", labels=tuple(map(str, range(100))), preprocess=preprocess, part="s0")
    export_bundle(zoo.create("resnet20", 100).eval(), card, folder)
    return folder

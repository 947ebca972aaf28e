"""The model that benches of our own tools are run on."""

from __future__ import annotations

from pathlib import Path


def resnet20(folder: Path) -> Path:
    """A bundle of a ResNet-20 for CIFAR-100 with random weights."""
    return _bundle(folder, "resnet20", "resnet20", 32)


def resnet18(folder: Path) -> Path:
    """A bundle of torchvision's ResNet-18 for 224 x 224, 100 classes, with random weights."""
    return _bundle(folder, "resnet18", "tv:resnet18", 224)


def _bundle(folder: Path, name: str, network: str, side: int) -> Path:
    import torch

    from rkd_deploy.card import ModelCard, Preprocess
    from rkd_deploy.export.bundle import export_bundle
    from rkd_deploy.models import zoo

    torch.manual_seed(0)
    preprocess = Preprocess(height=side, width=side, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    card = ModelCard(name=name, labels=tuple(map(str, range(100))), preprocess=preprocess, part="s0")
    export_bundle(zoo.create(network, 100).eval(), card, folder)
    return folder

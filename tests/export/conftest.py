"""Small trained-looking networks: every weight and every batch-norm statistic random, so that nothing folds by luck."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models import cifar
from rkd_deploy.models.residual import ResidualStudent

CLASSES = 5
SIZE = 8


def _scramble(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dtype.is_floating_point:
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.4, 0.4)
            tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def _model(assistants: int = 1) -> ResidualStudent:
    student = cifar.CifarResNet(8, (8, 8, 16, 24), None)
    chain = [cifar.CifarResNet(8, (8, 8, 8, 8), None) for _ in range(assistants)]
    return _scramble(ResidualStudent(student, chain, channels=12, num_classes=CLASSES))


def _card() -> ModelCard:
    preprocess = Preprocess(height=SIZE, width=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return ModelCard(name="tiny", labels=("a", "b", "c", "d", "e"), preprocess=preprocess)


@pytest.fixture
def model() -> ResidualStudent:
    return _model()


@pytest.fixture(params=[1, 2, 3])
def chain(request: pytest.FixtureRequest) -> ResidualStudent:
    """S with one, two and three assistants."""
    return _model(request.param)


@pytest.fixture
def card() -> ModelCard:
    return _card()


@pytest.fixture(scope="session")
def proto():
    """The ONNX model of `model` at level tail; read only."""
    card = _card()
    return to_onnx(ExportGraph(fuse(_model(), "tail"), card.preprocess), card.preprocess)


@pytest.fixture
def classifier() -> cifar.CifarResNet:
    return _scramble(cifar.CifarResNet(8, (8, 8, 8, 16), CLASSES))


@pytest.fixture
def classifier_of():
    """Makes a scrambled CIFAR ResNet of a depth, with its card."""

    def make(depth: int, size: int) -> tuple[nn.Module, ModelCard]:
        preprocess = Preprocess(height=size, width=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
        model = cifar.CifarResNet(depth, (16, 16, 32, 64), CLASSES)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # deep and random: keep the size of the maps
                nn.init.kaiming_normal_(module.weight)
        return model.eval(), ModelCard(name="deep", labels=tuple("abcde"), preprocess=preprocess)

    return make

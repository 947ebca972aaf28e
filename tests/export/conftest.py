"""Small trained-looking networks: every weight and every batch-norm statistic random, so that nothing folds by luck."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.data.sources import load_images
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.precision.images import Calibration, PrecisionJob
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.models.families import cifar_resnet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import Staged
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.runs import Run

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
    student = cifar_resnet.CifarResNet(8, (8, 8, 16, 24), None)
    chain = [cifar_resnet.CifarResNet(8, (8, 8, 8, 8), None) for _ in range(assistants)]
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
def classifier() -> cifar_resnet.CifarResNet:
    return _scramble(cifar_resnet.CifarResNet(8, (8, 8, 8, 16), CLASSES))


@dataclass(frozen=True)
class Trained:
    """A network that has learnt something, its float32 graph, and images to calibrate and to judge on."""

    model: Staged
    card: ModelCard
    graph: ExportGraph
    proto: Any
    calibration: Calibration
    held_out: list[tuple[np.ndarray, np.ndarray]]

    def job(self, **options: Any) -> PrecisionJob:
        chosen = PrecisionOptions(**options)
        calibration = self.calibration if chosen.precision in ("int8", "fp8") else None
        return PrecisionJob(options=chosen, held_out=self.held_out, held_out_source="digits", calibration=calibration)

    def logits(self, x_NHWC: np.ndarray) -> np.ndarray:
        """What PyTorch says, normalised by hand."""
        scaled = (x_NHWC / 255 - np.array(self.card.preprocess.mean)) / np.array(self.card.preprocess.std)
        with torch.no_grad():
            return self.model(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()).numpy()


def _trained(run: Run, model: Staged) -> Trained:
    images = load_images(replace(run.recipe.data, train_limit=None, test_limit=None, val_fraction=0.0), 0)
    height, width = images.image_size
    preprocess = Preprocess(height=height, width=width, mean=images.mean, std=images.std)
    card = ModelCard(name="digits", labels=images.classes, preprocess=preprocess, part="teacher")
    graph = ExportGraph(fuse(model.eval()), preprocess).eval()
    x_NHWC = images.train.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
    held_out = (x_NHWC[64:464], images.train.labels_N[64:464].numpy())
    proto = to_onnx(graph, preprocess)
    return Trained(model, card, graph, proto, Calibration(x_NHWC[:64], "digits", 0), [held_out])


@pytest.fixture(scope="session")
def trained(tiny_run: Run) -> Trained:
    """T of the shared run; read only."""
    return _trained(tiny_run, load_part(tiny_run, "teacher"))


@pytest.fixture(scope="session")
def uneven(tiny_run: Run) -> Trained:
    """The same function, hard to quantise: one channel before layer2.0.conv2 is 3000 times as large as it was.

    ReLU(3000 z) = 3000 ReLU(z), and the next convolution divides by it again; but one range for all channels of that
    map leaves the others a single step.
    """
    model = load_part(tiny_run, "teacher")
    block = model.layer2[0]
    with torch.no_grad():
        block.bn1.weight[0] *= 3000
        block.bn1.bias[0] *= 3000
        block.conv2.weight[:, 0] /= 3000
    return _trained(tiny_run, model)

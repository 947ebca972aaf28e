"""Lower precision on real images: the pretrained ResNet-20, 500 test images. benchmarks/precision.py takes all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.drawing import HELD_OUT, Batches, draw_lowering
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.judging import HeldOut, answers
from rkd_deploy.export.lowering import lower
from rkd_deploy.export.precision import PrecisionOptions
from rkd_deploy.models.zoo import create
from rkd_deploy.serve.backends.pytorch import PyTorchBackend

PREPROCESS = Preprocess(height=32, width=32, mean=(0.5070, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2761))


@pytest.fixture(scope="module")
def resnet20(cifar100, shared_data):
    network = create("resnet20", 100)
    network.load_state_dict(torch.load(shared_data / "weights/cifar100_resnet20.pth", weights_only=True))
    graph = ExportGraph(fuse(network.eval()), PREPROCESS).eval()
    reference = PyTorchBackend(ExportGraph(network, PREPROCESS), input_shape=(None, 32, 32, 3), input_dtype="uint8")
    card = ModelCard(name="resnet20", labels=cifar100.classes, preprocess=PREPROCESS)
    drawn = draw_lowering(cifar100, PrecisionOptions(precision="int8", count=64), PREPROCESS)
    batches = list(drawn.held_out)
    assert sum(len(labels_n) for _, labels_n in batches) == HELD_OUT
    test = list(Batches(cifar100.test.take(torch.arange(500))))
    return SimpleNamespace(
        graph=graph,
        proto=to_onnx(graph, PREPROCESS),
        calibration=drawn.calibration.images_NHWC,
        held_out=HeldOut(reference, batches[:1], card),
        test=[x for x, _ in test],
        labels_N=np.concatenate([labels_n for _, labels_n in test]),
        expected=reference.infer(np.concatenate([x for x, _ in test])),
    )


@pytest.mark.parametrize(
    ("precision", "target", "same", "lost"),
    [
        ("fp16", "cpu", 99.0, 0.4),
        ("int8", "cpu", 93.0, 2.0),
        ("int8", "openvino", 93.0, 2.0),
        ("int8", "tensorrt", 93.0, 2.0),
    ],
)
def test_a_file_classifies_real_images_as_the_network_does(resnet20, precision, target, same, lost):
    """`same` and `lost` are for 500 images, one of which is 0.2 %; the whole split has the benchmark's limits."""
    options = PrecisionOptions(precision=precision, target=target, drop=2.0)
    calibration = resnet20.calibration if precision == "int8" else None
    found = lower(resnet20.graph, resnet20.proto, PREPROCESS, calibration, resnet20.held_out, options)
    assert found.judgement.passed
    assert found.judgement.images == 256
    logits_NK = answers(found.proto, resnet20.test, options.prover)
    before = 100 * (resnet20.expected.argmax(1) == resnet20.labels_N).mean()
    assert before == pytest.approx(68.83, abs=3)  # published for all 10,000
    assert 100 * (logits_NK.argmax(1) == resnet20.expected.argmax(1)).mean() >= same
    assert before - 100 * (logits_NK.argmax(1) == resnet20.labels_N).mean() <= lost

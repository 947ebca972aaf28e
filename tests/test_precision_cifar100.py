"""Lower precision on real images: the pretrained ResNet-20, 500 test images; and the record of all with ResNet-56."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.precision.convert import convert
from rkd_deploy.export.precision.gate import HeldOut, logits_of
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.models.zoo import create
from rkd_deploy.pipeline import HELD_OUT, SplitBatches, precision_job

PREPROCESS = Preprocess(height=32, width=32, mean=(0.5070, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2761))


@pytest.fixture(scope="module")
def resnet20(cifar100, shared_data):
    network = create("resnet20", 100)
    network.load_state_dict(torch.load(shared_data / "weights/cifar100_resnet20.pth", weights_only=True))
    graph = ExportGraph(fuse(network.eval()), PREPROCESS).eval()
    reference = PyTorchBackend(ExportGraph(network, PREPROCESS), input_shape=(None, 32, 32, 3), input_dtype="uint8")
    card = ModelCard(name="resnet20", labels=cifar100.classes, preprocess=PREPROCESS)
    drawn = precision_job(cifar100, PrecisionOptions(precision="int8", count=64), PREPROCESS)
    batches = list(drawn.held_out)
    assert sum(len(labels_n) for _, labels_n in batches) == HELD_OUT
    test = list(SplitBatches(cifar100.test.take(torch.arange(500))))
    return SimpleNamespace(
        graph=graph,
        proto=to_onnx(graph, PREPROCESS),
        calibration=drawn.calibration.images_NHWC,
        held_out=HeldOut(reference, batches[:1], card),
        test=[x for x, _ in test],
        labels_N=np.concatenate([labels_n for _, labels_n in test]),
        expected=reference.infer(np.concatenate([x for x, _ in test])),
    )


IMAGES = 500
CASES = [("fp16", "cpu", 0.1, 99.0), ("int8", "cpu", 0.5, 96.0), ("int8", "openvino", 0.5, 96.0)]
CASES += [("int8", "tensorrt", 0.5, 96.0)]


@pytest.mark.parametrize(("precision", "target", "points", "same"), CASES)
def test_a_file_classifies_500_test_images_as_the_network_does(resnet20, precision, target, points, same):
    """500 images cannot show a loss of half a point: of d changed classes, chance alone loses about sqrt(d).

    So the sample is held to the limit plus twice that, in images, and to the share of classes that stay. All 10,000 are
    in the record.
    """
    options = PrecisionOptions(precision=precision, target=target)
    calibration = resnet20.calibration if precision == "int8" else None
    actual = convert(resnet20.graph, resnet20.proto, PREPROCESS, calibration, resnet20.held_out, options)
    assert actual.result.images == 256
    logits_NK = logits_of(actual.proto, resnet20.test, options.prover)
    assert len(logits_NK) == IMAGES
    right_N, expected_N = resnet20.labels_N, resnet20.expected.argmax(1)
    assert 100 * (expected_N == right_N).mean() == pytest.approx(68.83, abs=3)  # published for all 10,000
    changed = int((logits_NK.argmax(1) != expected_N).sum())
    assert changed <= (100 - same) * IMAGES / 100
    lost = int((expected_N == right_N).sum()) - int((logits_NK.argmax(1) == right_N).sum())
    assert lost <= points * IMAGES / 100 + 2 * changed**0.5


@pytest.mark.parametrize(("precision", "target", "points", "same"), CASES)
def test_the_record_says_what_all_10000_test_images_lose(precision, target, points, same):
    """ResNet-56, by benchmarks/precision.py: 0.1 points for fp16, 0.5 for int8."""
    record = max((Path(__file__).parents[1] / "benchmarks").glob("precision_*.json"), key=lambda path: path.name[-13:])
    claims = {claim["what"]: claim for claim in json.loads(record.read_text())["claims"]}
    assert claims["ResNet-56, 10000 test images: fp32"]["value"] == pytest.approx(72.63, abs=0.02)
    prover = "openvino" if target == "openvino" else "onnxruntime"
    lost = claims[f"ResNet-56 {precision} for {target} on {prover}: points lost"]
    assert lost["limit"] == points
    assert lost["value"] <= points

"""Every family through the whole export: fused in float64, and as an ONNX file run by ONNX Runtime."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import optimizer
from torch import nn

from rkd_deploy.card import Preprocess
from rkd_deploy.export.fusion import LEVELS, fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.families.mobilenet import MobileNetV2
from rkd_deploy.models.families.resnet50 import ResNet50
from rkd_deploy.models.families.shufflenet import ShuffleNetV1, ShuffleNetV2
from rkd_deploy.models.families.vgg import VGG
from rkd_deploy.models.families.wide_resnet import WideResNet
from rkd_deploy.models.residual import ResidualStudent
from tests.support.adapters import adapted, learnt

NARROW = {
    "wrn": (WideResNet(10, (8, 8, 8, 16), None), WideResNet(10, (4, 6, 8, 8), None)),
    "cifar": (CifarResNet(8, (4, 4, 8, 12), None), CifarResNet(8, (6, 4, 8, 8), None)),
    "vgg": (VGG((1, 2, 1, 1, 1), (8, 8, 8, 16, 16), None), VGG((1, 2, 1, 1, 1), (4, 5, 6, 7, 8), None)),
    "mobilenetv2": (MobileNetV2((8,) * 9, None), MobileNetV2((4, 5, 6, 7, 8, 8, 8, 8, 16), None)),
    "shufflenetv1": (ShuffleNetV1((12, 12, 24, 24), None), ShuffleNetV1((12, 12, 12, 12), None)),
    "shufflenetv2": (ShuffleNetV2((4, 8, 8, 16, 16), None), ShuffleNetV2((4, 6, 8, 10, 12), None)),
    "resnet50": (ResNet50((8, 8, 8, 8, 8), None), ResNet50((4, 4, 4, 4, 4), None)),
}
PREPROCESS = Preprocess(height=32, width=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), embedded=False)
# A batch norm after an addition or a concatenation has no convolution to go into: in a Wide ResNet that of the first
# block where the shortcut takes the stem's output too, those of later blocks, and the last. Merged, two are one.
LEFT = {"wrn": {"sum": (3 + 1) + (2 + 1), "tail": (3 + 1) + (2 + 1), "wide": 3 + 1, "wide-grouped": 3 + 1}}


@pytest.fixture
def residual(family):
    """S + A of the family, as after training: statistics are those of random images, the rest is random."""
    return as_trained(family)


def as_trained(family):
    student, assistant = (branch.rebuilt(branch.widths, None) for branch in NARROW[family])
    model = ResidualStudent(student, [assistant], channels=12, num_classes=5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average of all batches: nothing of the initial 1 is left
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    learnt(model.assistant_adapters[0])
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


@torch.no_grad()
def of_common_size(model, x_NCHW):
    """Random weights give logits of any size: brought to 5 at most, for which a difference of 1e-4 is meant."""
    model.head.weight /= model(x_NCHW.float()).abs().max() / 5
    return model


def pictures(cifar100):
    """Six photos and two of noise, normalised: float64 [8, 3, 32, 32]."""
    real = cifar100.test.images_NCHW[:6].numpy() / 255
    noise = np.random.default_rng(0).random((2, 3, 32, 32))
    mean, std = (np.array(values)[:, None, None] for values in (PREPROCESS.mean, PREPROCESS.std))
    return torch.from_numpy((np.concatenate([real, noise]) - mean) / std)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", NARROW)
@torch.no_grad()
def test_fused_equals_the_formula_in_float64_on_photos_and_noise(residual, family, level, cifar100):
    model, x_NCHW = residual.double(), pictures(cifar100)
    total = 0
    for branch, P in ((model.student, model.student_adapter), (model.assistants[0], model.assistant_adapters[0])):
        total = total + adapted(P, branch.features(x_NCHW)[-1])
    expected = torch.einsum("kt,nt->nk", model.head.weight, total.mean((2, 3))) + model.head.bias
    assert expected.std(0).max() > 0.01  # it does depend on the image
    fused = fuse(model, level)
    torch.testing.assert_close(fused(x_NCHW), expected, rtol=0, atol=1e-10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == LEFT.get(family, {}).get(level, 0)


# Half a minute of export each is left out: sum and wide-grouped have no operator that these two have not.
EXPORTED = {"shufflenetv1": ("tail", "wide"), "shufflenetv2": ("tail", "wide")}


class EveryLevel(nn.Module):
    """A network of its own at each level, all in one graph: one export instead of four."""

    def __init__(self, models):
        super().__init__()
        self.outputs = list(models)
        self.graphs = nn.ModuleList(ExportGraph(fuse(model, level), PREPROCESS) for level, model in models.items())

    def forward(self, x_NCHW):
        return tuple(graph(x_NCHW) for graph in self.graphs)


@pytest.mark.parametrize("family", NARROW)
def test_the_file_answers_as_pytorch_does_and_nothing_is_left_to_optimise(family, cifar100, tmp_path):
    x_NCHW = pictures(cifar100)
    # With weights of their own, else equal layers would be merged.
    models = {level: of_common_size(as_trained(family), x_NCHW) for level in EXPORTED.get(family, LEVELS)}
    proto = to_onnx(EveryLevel(models), PREPROCESS)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (x_NCHW, x_NCHW[:1]):
        actual = session.run(list(models), {"input": x.numpy().astype(np.float32)})
        for (level, model), logits in zip(models.items(), actual, strict=True):
            with torch.no_grad():
                expected = model.double()(x).numpy()
            assert np.ptp(expected) > 0.01
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4, err_msg=level)
    assert optimised_away(proto, tmp_path) == {}
    norms = sum(node.op_type == "BatchNormalization" for node in proto.graph.node)
    assert norms == sum(LEFT.get(family, {}).values())


def test_nothing_is_left_to_optimise_with_the_preprocessing_inside(proto, tmp_path):
    assert proto.graph.node[0].op_type == "Cast"
    assert optimised_away(proto, tmp_path) == {}


def optimised_away(proto, folder):
    """What ONNX Runtime's basic optimisation, the part that any provider gets, and onnxscript's would remove."""
    before = Counter(node.op_type for node in proto.graph.node)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "basic.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    basic = onnx.load(folder / "basic.onnx")
    script = optimizer.optimize(copy.deepcopy(proto))
    return {
        name: removed
        for name, model in (("ONNX Runtime", basic), ("onnxscript", script))
        if (removed := before - Counter(node.op_type for node in model.graph.node))
    }

"""Ten networks of torchvision and timm as S0: split within its cost, steps that learn, and a file that agrees."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate

CLASSES, SIDE = 4, 64
NETWORKS = (
    "tv:resnet18",
    "tv:resnet50",
    "tv:mobilenet_v2",
    "tv:mobilenet_v3_small",
    "tv:vgg11_bn",
    "tv:efficientnet_b0",
    "tv:densenet121",
    "tv:shufflenet_v2_x1_0",
    "timm:regnety_004",
    "timm:convnext_atto",
)
NOT_WIDE: dict[str, str] = {"timm:convnext_atto": "is no operation that it knows"}
"""Why S and A of these are not merged: it normalises over channels, where S's and A's would mix."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_split_within_its_cost_learns_and_is_exported(name: str) -> None:
    s0 = zoo.create(name, CLASSES, input_size=(SIDE, SIDE))
    outcome = separate(s0, num_classes=CLASSES, input_size=SIDE, assistant_share=0.3, weights="inherited")
    model = ResidualStudent(outcome.student, outcome.assistants, s0.channels, CLASSES)
    torch.nn.init.normal_(model.assistant_adapters[0].norm.weight, std=0.01)  # zero, else: A would get no gradient
    assert count(model, SIDE).macs == outcome.cost <= outcome.budget == count(s0, SIDE).macs
    assert outcome.cost > 0.97 * outcome.budget
    for network in (outcome.student, outcome.assistant):
        trio = zip(network.widths, network.steps(8), outcome.s0_widths, strict=True)
        assert all(width % step == 0 or width == s0_width for width, step, s0_width in trio)
    x_NCHW, y_N = torch.randn(8, 3, SIDE, SIDE), torch.arange(8) % CLASSES
    check_steps(model.train(), x_NCHW, y_N)
    check_file(model.eval(), x_NCHW)
    if name != "tv:densenet121":  # 15 seconds of merging; test_wide.py has a small one
        check_wide(name, model.double(), x_NCHW[:2].double())


def check_steps(model: ResidualStudent, x_NCHW: Tensor, y_N: Tensor) -> None:
    """Three steps of gradient descent, each of which lowers the loss by what its gradient foretells.

    By Taylor, a step -r g changes the loss by -r |g|^2 to first order. At random weights |g| differs a hundredfold
    between networks (in a deep one each batch norm adds to it), so no one rate is small for all: r is chosen for the
    same foretold fall. At 64 px, because at 32 px these networks end in 1x1 maps, where batch norm sees 8 numbers.
    """
    fall = 0.005
    for _ in range(3):
        model.zero_grad()
        before = loss_of(model, x_NCHW, y_N)
        before.backward()
        with torch.no_grad():
            pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None]
            assert all(grad.isfinite().all() for _, grad in pairs)
            assert {id(p) for p in model.parameters()} == {id(p) for p, _ in pairs}
            rate = fall / sum(float(grad.square().sum()) for _, grad in pairs)
            for parameter, grad in pairs:
                parameter -= rate * grad
            after = loss_of(model, x_NCHW, y_N)
        assert 0.5 * fall < before.item() - after.item() < 1.5 * fall


def loss_of(model: ResidualStudent, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
    torch.manual_seed(1)  # the same dropout
    return cross_entropy(model(x_NCHW), y_N)


def check_file(model: ResidualStudent, x_NCHW: Tensor) -> None:
    """S + A, fused at level tail, in ONNX Runtime against PyTorch in double precision."""
    preprocess = Preprocess(height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3, embedded=False)
    with torch.no_grad():
        for _ in range(10):  # statistics of these images: those it began with let deep maps die out
            model.train()(x_NCHW)
    proto = to_onnx(ExportGraph(fuse(model.eval(), "tail"), preprocess), preprocess)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = x_NCHW[:3].numpy()
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(x).double()).numpy()
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(session.run(["logits"], {"input": x})[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_wide(name: str, model: ResidualStudent, x_NCHW: Tensor) -> None:
    """Level wide in double precision: equal to two branches, or a reason and a way out."""
    if reason := NOT_WIDE.get(name):
        with pytest.raises(UsageError, match=rf"Level wide cannot merge .*{reason}.*--fuse tail"):
            fuse(model, "wide")
        return
    expected = model(x_NCHW)
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(fuse(model, "wide")(x_NCHW), expected, rtol=0, atol=1e-10 * size)

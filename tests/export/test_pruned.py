"""Ten networks of torchvision and timm as S0: split within its cost, a step that learns, and a file that agrees."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import cross_entropy

from rkd_deploy.card import Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.separation import separate

CLASSES = 4
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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_split_within_its_cost_learns_and_is_exported(name):
    side = 64 if name == "timm:convnext_atto" else 32  # its last map is at 1/32
    given = zoo.create(name, CLASSES, input_size=(side, side))
    made = separate(given, num_classes=CLASSES, input_size=side, assistant_share=0.3, weights="inherited")
    model = ResidualStudent(made.student, made.assistants, given.channels, CLASSES)
    assert count(model, side).macs == made.cost <= made.budget == count(given, side).macs
    assert made.cost > 0.97 * made.budget
    for widths, steps in ((network.widths, network.steps(8)) for network in (made.student, made.assistant)):
        full = made.given_widths
        assert all(w % step == 0 or w == own for w, step, own in zip(widths, steps, full, strict=True))

    x_NCHW, y_N = torch.randn(8, 3, side, side), torch.arange(8) % CLASSES
    model.train()
    torch.nn.init.normal_(model.assistant_adapters[0].weight, std=0.01)  # zero, else: A would get no gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0005)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)  # the same dropout
        loss = cross_entropy(model(x_NCHW), y_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    check_file(StudentAlone(model).eval(), side)  # one branch has every operator, and exports in half the time


def check_file(model, side):
    preprocess = Preprocess(height=side, width=side, mean=(0.5,) * 3, std=(0.25,) * 3, embedded=False)
    with torch.no_grad():
        for _ in range(10):  # statistics of random images: those it began with let deep maps die out
            model.train()(torch.randn(8, 3, side, side))
    proto = to_onnx(ExportGraph(fuse(model.eval(), "tail"), preprocess), preprocess)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 3, side, side), dtype=np.float32)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(x).double()).numpy()
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(session.run(["logits"], {"input": x})[0], expected, rtol=1e-4, atol=1e-4)

"""A head that is more than a linear layer, through both levels of fusion, against the formula in float64."""

import pytest
import torch
from torch import nn

from rkd_deploy.export.fusion import LEVELS, fuse
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from tests.support.adapters import adapted, learnt

HEADS = {
    "norm and linear": lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 5)),
    "perceptron": lambda: nn.Sequential(nn.Linear(12, 6), nn.Hardswish(), nn.Linear(6, 5)),
    "linear without bias": lambda: nn.Linear(12, 5, bias=False),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_fused_equals_the_formula(head, level):
    h = HEADS[head]()
    model = ResidualStudent(CifarResNet(8, (8, 8, 8, 8), None), [CifarResNet(8, (4, 4, 4, 4), None)], 12, 5, h)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    for adapter in (model.student_adapter, model.assistant_adapters[0]):
        learnt(adapter, std=2.0)
    model = model.double().eval()
    x_NCHW = torch.randn(3, 3, 8, 8, dtype=torch.float64) * torch.tensor([0.3, 1, 3]).view(3, 1, 1, 1)
    s, a = model.student.features(x_NCHW)[-1], model.assistants[0].features(x_NCHW)[-1]
    for parts, network in (
        (((model.student_adapter, s),), StudentAlone(model)),
        (((model.student_adapter, s), (model.assistant_adapters[0], a)), model),
    ):
        total = sum(adapted(P, f) for P, f in parts)
        expected = h(total.mean((2, 3)))
        assert expected.std(0).max() > 1e-3  # it does depend on the image
        fused = fuse(network, level)
        torch.testing.assert_close(fused(x_NCHW), expected, rtol=0, atol=1e-10)
        if level == "tail":
            assert not any(
                isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.out_channels == 12
                for module in fused.modules()
            )

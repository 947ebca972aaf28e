"""S and A on a trunk: the sum by hand in float64, the trunk of every family, the budget."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.errors import BudgetError, UsageError
from rkd_deploy.export.fusion import LEVELS, fuse
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.trunk import parted, trunk_widths
from tests.support.adapters import adapted, learnt

CHANNELS, CLASSES = 9, 4
WIDTHS = {1: ((4, 4, 6, 8), (4, 4, 3, 5), (4, 4, 2, 4)), 2: ((4, 4, 6, 8), (4, 4, 6, 5), (4, 4, 6, 3))}
FAMILIES = ("resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50")


def used(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return model


@pytest.fixture(params=[1, 2])
def whole(request: pytest.FixtureRequest) -> tuple[int, list[CifarResNet]]:
    """j, and S and two assistants as whole networks."""
    return request.param, [CifarResNet(8, widths, None) for widths in WIDTHS[request.param]]


@pytest.fixture
def model(whole: tuple[int, list[CifarResNet]]) -> ResidualStudent:
    """In float64, as after training."""
    j, (S, *assistants) = whole
    student = parted(S, assistants, j, CHANNELS, CLASSES)
    used(student)
    for _, adapter in student.branches():
        learnt(adapter, std=0.7)
    return student.double().eval()


def by_hand(
    j: int, networks: list[CifarResNet], model: ResidualStudent, x: Tensor, *, training: bool = False
) -> list[Tensor]:
    """P f of every branch: whole networks whose first stages are S's."""
    sums = []
    for network, (_, adapter) in zip(networks, model.branches(), strict=True):
        copied = copy.deepcopy(network).double().train(training)
        trunk = copy.deepcopy(networks[0]).double().train(training)
        if j == 2:
            copied.layer2 = trunk.layer2
        copied.conv1, copied.bn1, copied.layer1 = trunk.conv1, trunk.bn1, trunk.layer1
        sums.append(adapted(adapter, copied.features(x)[-1], training=training))
    return sums


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_every_level_is_the_sum_by_hand(
    whole: tuple[int, list[CifarResNet]], model: ResidualStudent, level: str
) -> None:
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    maps = by_hand(*whole, model, x)
    for network, stage_map in ((model, maps), (StudentAlone(model).eval(), maps[:1])):
        expected = model.head(sum(stage_map).mean((2, 3)))
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-10)
        fused = fuse(network, level)
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-10)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert (maps[1].abs().max(), maps[2].abs().max()) > (0.1, 0.1)
    torch.testing.assert_close(model.summed_map(x, 1), maps[0] + maps[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.assistant_map(x, 2), maps[2], rtol=0, atol=1e-10)


def test_the_trunk_is_there_once(whole: tuple[int, list[CifarResNet]], model: ResidualStudent) -> None:
    j, (S, *assistants) = whole
    once = sum(count(network, 16).macs for network in (S, *assistants))
    trunk = count(nn.Sequential(*S.stages()[:j]), 16).macs
    adapters = sum(network.channels * CHANNELS * 4 * 4 for network in (S, *assistants))
    assert count(model, 16).macs == once - 2 * trunk + adapters + CHANNELS * CLASSES
    assert count(StudentAlone(model), 16).macs == count(S, 16).macs + S.channels * CHANNELS * 16 + CHANNELS * CLASSES


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_of_a_trunk_are_those_that_its_stages_have(name: str) -> None:
    """Whatever they stand for in the family: the more stages, the more of them, and never those of the last one."""
    network = zoo.create(name, CLASSES)
    last = len(network.stages())
    indices = [set(trunk_widths(network, j)) for j in range(1, last)]
    assert indices[0]
    assert all(fewer <= other for fewer, other in pairwise(indices))
    assert indices[-1] < set(range(len(network.widths)))
    if name == "resnet8":
        assert indices == [{0, 1}, {0, 1, 2}]


SHARES = {"shufflenetv1": 0.8}
"""Where 0.3 of the parameters is less than the narrowest end: most of them are in its last stage."""


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", FAMILIES)
def test_s_and_a_on_a_trunk_keep_the_budget(name: str, unit: str) -> None:
    share = SHARES.get(name, 0.3)
    cut = separate(name, num_classes=CLASSES, input_size=32, budget=unit, layout="trunk", assistant_share=share)
    C_T = zoo.create(name, CLASSES).channels
    model = parted(cut.student, cut.assistants, cut.shared_stages, C_T, CLASSES)
    cost = count(model, 32)
    assert (cost.macs if unit == "macs" else cost.parameters) == cut.cost <= cut.budget
    assert cut.parts["assistant"] + cut.parts["assistant_adapter"] <= share * cut.budget
    assert cut.level == "tail"
    assert cut.shared_stages == len(zoo.create(name, CLASSES).stages()) - 1


def test_what_cannot_be_parted_is_refused() -> None:
    def parting(**how: object) -> None:
        separate("resnet8", num_classes=4, input_size=32, **{"layout": "trunk", **how})  # type: ignore[arg-type]

    with pytest.raises(UsageError, match=r"shared_stages = 3: CifarResNet has 3 stages, .* 1 to 2 of them"):
        parting(shared_stages=3)
    with pytest.raises(UsageError, match=r'shared_stages = 1 is read with layout = "trunk" only'):
        parting(layout="branches", shared_stages=1)
    with pytest.raises(UsageError, match=r"begins with fresh weights"):
        parting(weights="inherited")
    with pytest.raises(BudgetError, match=r"too small for the assistant's end behind the trunk"):
        parting(assistant_share=0.01)
    external = zoo.create("tv:resnet18", 4, input_size=(32, 32))
    with pytest.raises(UsageError, match="cannot be cut into stages"):
        separate(external, num_classes=4, input_size=32, layout="trunk")

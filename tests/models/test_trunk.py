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
from rkd_deploy.models.external import External
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.separation.inheritance import inherit_weights
from rkd_deploy.models.separation.pruning import Pruned
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.trunk import parted
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
    indices = [set(network.widths_before(j)) for j in range(1, last)]
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
    with pytest.raises(BudgetError, match=r"too small for the assistant's end behind the trunk"):
        parting(assistant_share=0.01)


@pytest.mark.parametrize("name", ["tv:resnet18", "timm:test_resnet", "timm:test_efficientnet"])
@torch.no_grad()
def test_networks_that_are_not_ours_part_behind_a_trunk(name: str) -> None:
    """S whole, and A whole with S's first stages put into it, against both on one trunk, at every level."""
    s0 = zoo.create(name, CLASSES, input_size=(32, 32))
    cut = separate(s0, num_classes=CLASSES, input_size=32, layout="trunk", assistant_share=0.4, channels=CHANNELS)
    S, A = copy.deepcopy(cut.student), copy.deepcopy(cut.assistant)
    assert isinstance(S, Pruned)
    assert isinstance(A, Pruned)
    model = parted(cut.student, cut.assistants, cut.shared_stages, CHANNELS, CLASSES)
    assert count(model, 32).macs == cut.cost <= cut.budget
    used(model)
    for _, adapter in model.branches():
        learnt(adapter, std=0.7)
    model.double().eval()
    assert model.trunk is not None
    trained = {name.partition(".network.")[2]: value for name, value in model.trunk.state_dict().items()}
    for whole, end in ((S, model.student), (A, model.assistants[0])):
        ends = {name.partition(".network.")[2]: value for name, value in end.state_dict().items()}
        assert not ends.keys() & trained.keys()
        left_out = whole.double().eval().backbone.network.load_state_dict(trained | ends, strict=False)
        assert left_out.unexpected_keys == []
        assert set(left_out.missing_keys) <= {key for key in left_out.missing_keys if "num_batches" in key}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    maps = [
        adapted(adapter, whole.features(x)[-1]) for whole, (_, adapter) in zip((S, A), model.branches(), strict=True)
    ]
    expected = model.head(sum(maps).mean((2, 3)))
    assert maps[1].abs().max() > 0.01
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    for level in LEVELS:
        torch.testing.assert_close(fuse(model, level)(x), expected, rtol=0, atol=1e-10)


class Skip(nn.Module):
    """Its last stage reads the first one's map too, or overwrites the map before it, or looks at a value."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.three, self.fc, self.fault = nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, CLASSES), fault

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one)
        if self.fault == "value" and two.sum() > 1e9:
            two = -two
        x = nn.functional.relu(two, inplace=self.fault == "inplace")
        if self.fault == "skip":
            x = x + nn.functional.avg_pool2d(one, 2)
        return self.fc(torch.relu(self.three(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("skip", "what leads to three needs more than the map of two"),
        ("inplace", "overwrites the map that it takes"),
        ("value", "its forward pass looks at values"),
    ],
)
def test_a_network_that_is_no_chain_of_stages_is_refused(fault: str, why: str) -> None:
    stages = ("one", "two", "three")
    external = External(Skip(fault), stages, input_size=32)
    with pytest.raises(UsageError, match=rf"Skip cannot be cut into stages: .*{why}"):
        external.parts()
    assert [
        part(torch.rand(1, c, s, s)).shape[1:]
        for part, c, s in zip(
            External(Skip("none"), stages, input_size=32).parts(), (3, 16, 16), (32, 16, 8), strict=True
        )
    ] == [(16, 16, 16), (16, 8, 8), (16, 4, 4)]


@torch.no_grad()
def test_on_a_trunk_s_and_a_inherit_one_trunk_and_other_channels_behind_it() -> None:
    """Behind the trunk A begins with the channels that S left; both read the same channels of the trunk's map."""
    torch.manual_seed(0)
    source = CifarResNet(8, (16, 16, 32, 64), CLASSES)
    source.layer3[0].conv1.weight.copy_((torch.arange(64)[:, None] + torch.arange(32) / 100)[:, :, None, None])
    S, A = CifarResNet(8, (16, 16, 12, 24), None), CifarResNet(8, (16, 16, 12, 20), None)
    copies = [copy.deepcopy(S), copy.deepcopy(A)]
    model = parted(S, [A], 2, 64, CLASSES)
    inherit_weights([model.student_network(), model.assistants[0]], source, (32, 32), 2)
    told = [end.stages[0][0].conv1.weight[:, :, 0, 0] for end in (model.student, model.assistants[0])]
    outputs, inputs = zip(*(({int(v) for v in w.flatten()}, (w[0] % 1).tolist()) for w in told), strict=True)
    assert (len(outputs[0]), len(outputs[1]), len(set(inputs[0]))) == (24, 20, 12)
    assert not outputs[0] & outputs[1]
    assert min(outputs[0]) > max(outputs[1])  # by their norms, which rise with the number here
    assert inputs[0] == pytest.approx(inputs[1], abs=1e-4)
    inherit_weights(copies, source, (32, 32), 2)
    again = parted(copies[0], copies[1:], 2, 64, CLASSES)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        if not name.startswith(("head", "student_adapter", "assistant_adapters")):
            assert torch.equal(one, other), name

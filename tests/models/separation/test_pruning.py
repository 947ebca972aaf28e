"""Structural pruning: costs of what is built, weights against channels silenced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.separation.channels import STAYS
from rkd_deploy.models.separation.coupling import trace_channels
from rkd_deploy.models.separation.inheritance import inherit, inherit_weights
from rkd_deploy.models.separation.pruning import Pruner
from rkd_deploy.models.separation.separate import narrow

SIZE = (32, 32)


class Small(nn.Module):
    """What is hard to narrow, in few layers: a residual sum, a join, groups, a depthwise convolution, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.same = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.more = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.wide = nn.Sequential(nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32))
        self.gate = nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([(x + self.same(x)).relu(), self.more(x)], dim=1)
        x = self.depthwise(self.grouped(self.wide(x)))
        return (x * self.gate(x.mean((2, 3), keepdim=True))).mean((2, 3))


def scrambled(network: nn.Module) -> nn.Module:
    """Batch norm as after training, so that none of it is an identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    network = scrambled(Small())
    return network, Pruner(network, SIZE)


def test_spaces_are_what_can_be_removed_alone(small):
    _, pruner = small
    spaces = {space.name: (space.channels, space.size) for space in pruner.channels.spaces}
    assert spaces == {"stem.0": (16, 1), "more.0": (8, 1), "wide.0": (32, 4), "gate.0": (8, 1)}
    assert pruner.widths == (16, 8, 32, 8)
    assert pruner.steps(1) == (1, 1, 4, 1)  # whole groups of 4 channels
    assert pruner.steps(6) == (6, 6, 12, 6)


@pytest.mark.parametrize("widths", [(16, 8, 32, 8), (8, 8, 16, 8), (5, 3, 4, 1), (1, 8, 28, 2)])
def test_the_price_is_the_cost_of_what_is_built(small, widths):
    _, pruner = small
    a, b, c, d = widths  # in closed form, at 16 x 16 positions
    layers = 27 * a + 9 * a * a + a * b + (a + b) * c + 9 * 4 * c + 9 * c
    macs = layers * 256 + 2 * c * d
    params = layers + 2 * c * d + d + c + 2 * (a + a + b + c + c + c)
    assert pruner.cost(widths) == (macs, params)
    built = count(pruner.narrowed(widths), SIZE)
    assert (built.macs, built.parameters) == (macs, params)
    assert pruner.output_channels(widths) == c


def silenced(network: nn.Module, pruner: Pruner, units_left: set[int]) -> nn.Module:
    """A copy in which every tensor is zero at the channels that are not kept."""
    network = copy.deepcopy(network)
    state = network.state_dict()
    for (name, dim), units in pruner.channels.axes.items():
        if "running" not in name:
            gone = [index for index, unit in enumerate(units.tolist()) if unit != STAYS and unit not in units_left]
            state[name].index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    return network


@pytest.mark.parametrize("widths", [(8, 8, 16, 8), (5, 3, 8, 2)])
def test_what_is_inherited_computes_what_the_network_does_with_the_others_silenced(small, widths):
    network, pruner = small
    narrowed = pruner.narrowed(widths).eval()
    nn.init.normal_(narrowed.stem[0].weight)  # what it had is overwritten
    inherit([narrowed.state_dict()], network.state_dict(), pruner.channels)
    units_left = set()
    for space in pruner.channels.spaces:
        best = np.argsort(-space.importance, kind="stable")[: widths[space.width] // space.size]
        units_left |= set(space.units[best].tolist())
    x_NCHW = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        output, expected = narrowed(x_NCHW), silenced(network, pruner, units_left)(x_NCHW)
    expected = expected[:, expected.abs().sum(0) > 0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_a_silent_channel_is_the_least_important():
    torch.manual_seed(0)
    network = scrambled(Small())
    with torch.no_grad():
        network.more[0].weight[5] = 0
        network.more[1].weight[5] = 0
        network.wide[0].weight[:, 16 + 5] = 0
    space = next(space for space in trace_channels(network, SIZE).spaces if space.name == "more.0")
    assert space.importance.argmin() == 5
    assert space.importance[5] == 0


def test_each_branch_takes_up_the_ranking_where_the_one_before_has_left_it():
    source = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        for channel, norm in enumerate((3, 8, 1, 6, 5, 2, 7, 4)):  # ranking: 1 6 3 4 7 0 5 2
            source[0].weight[channel] = norm
    pruner = Pruner(source, SIZE)
    branches = [pruner.narrowed((width,)) for width in (3, 2, 4)]
    inherit([branch.state_dict() for branch in branches], source.state_dict(), pruner.channels)
    norms = [branch[0].weight[:, 0, 0, 0].tolist() for branch in branches]
    assert norms == [
        [8, 6, 7],
        [5, 4],
        [3, 8, 1, 2],
    ]  # by the norms, in the order of the channels; the last wraps round


# Built-in families


@pytest.mark.parametrize("widths", [(8, 8, 16, 24), (12, 12, 32, 64)])
def test_pruning_a_resnet_agrees_with_building_it_at_these_widths(widths):
    original = scrambled(zoo.create("resnet14", 10).without_head())
    built = original.rebuilt(widths, None).eval()
    pruner = Pruner(original, SIZE)
    by_layer = dict(zip(("conv1", "layer1", "layer2", "layer3"), widths, strict=True))
    pruned = pruner.narrowed([by_layer[space.name.split(".")[0]] for space in pruner.channels.spaces])
    assert {k: v.shape for k, v in pruned.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert (count(pruned, SIZE), *map(type, pruned.children())) == (count(built, SIZE), *map(type, built.children()))

    inherit_weights([built], original, SIZE)
    best = {
        space.name: np.sort(np.argsort(-space.importance, kind="stable")[: by_layer[space.name.split(".")[0]]])
        for space in trace_channels(original, SIZE).spaces
    }
    # Plain slicing, layer by layer: in the first stage the stem's channels are the stage's, by the identity shortcuts.
    torch.testing.assert_close(built.conv1.weight, original.conv1.weight[best["conv1"]])
    inner = best["layer1.1.conv1"]
    torch.testing.assert_close(built.layer1[1].conv1.weight, original.layer1[1].conv1.weight[inner][:, best["conv1"]])
    torch.testing.assert_close(built.layer1[1].conv2.weight, original.layer1[1].conv2.weight[best["conv1"]][:, inner])
    torch.testing.assert_close(built.bn1.running_var, original.bn1.running_var[best["conv1"]])


def test_a_family_that_narrows_otherwise_cannot_inherit():
    original = zoo.create("shufflenetv1", 10)
    with pytest.raises(UsageError, match=r'could inherit.*Set student\.weights = "fresh"'):
        inherit_weights([original.rebuilt((24, 120, 120, 240), None)], original, SIZE)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_fraction_of_a_network_costs_no_more_and_a_step_more_would(unit, closed_form):
    full = (16, 16, 32, 64)
    widths = narrow(CifarResNet(8, full, 10), 0.5, num_classes=10, input_size=SIZE, budget=unit)
    limit = closed_form.network(unit, 8, full, 10, SIZE) // 2
    assert closed_form.network(unit, 8, widths, 10, SIZE) <= limit
    for index, width in enumerate(widths):
        wider = (*widths[:index], width + 8, *widths[index + 1 :])
        assert width == full[index] or closed_form.network(unit, 8, wider, 10, SIZE) > limit


# Obstacles


class Halves(nn.Module):
    """Sizes written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).unflatten(1, (2, 8)).sum(1)).mean((2, 3))


def test_a_transformer_is_refused_by_name():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1)
    with pytest.raises(UsageError, match=r"module VisionTransformer\.blocks\.0\.attn, operator .*attention.*teacher"):
        Pruner(vit, SIZE)


def test_an_obstacle_is_named():
    with pytest.raises(UsageError, match=r"cannot be narrowed: the channels of module (first|second)"):
        Pruner(Halves(), SIZE)

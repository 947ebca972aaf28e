"""Channels that go together, in networks of the kinds on which following them went wrong."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from rkd_deploy.errors import BudgetError
from rkd_deploy.models.cost import count
from rkd_deploy.models.external import External
from rkd_deploy.models.separation.channels import STAYS
from rkd_deploy.models.separation.coupling import trace_channels
from rkd_deploy.models.separation.inheritance import inherit
from rkd_deploy.models.separation.pruning import Pruner
from rkd_deploy.models.separation.separate import separate

SIZE = (16, 16)


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Overlapping(nn.Module):
    """Shortcuts added to the first channels of a wider map, block after block, as in ReXNet: 2^blocks sets."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        widths = [8 + number for number in range(blocks + 1)]
        self.stem = conv(3, widths[0], 3, 2)
        self.expand = nn.ModuleList(conv(width, 16) for width in widths[:-1])
        self.project = nn.ModuleList(conv(16, width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for expand, project in zip(self.expand, self.project, strict=True):
            y, channels = project(expand(x).relu()), x.shape[1]
            x = torch.cat([y[:, :channels] + x, y[:, channels:]], dim=1)
        return x


class Ghost(nn.Module):
    """Half of each map is a depthwise convolution of the other half, and the sum ties the halves (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, 2)
        self.primary, self.cheap = (
            nn.ModuleList([conv(16, 12), conv(24, 8)]),
            nn.ModuleList([conv(12, 12, 3, groups=12), conv(8, 8, 3, groups=8)]),
        )

    def ghost(self, number: int, x: Tensor, channels: int) -> Tensor:
        half = self.primary[number](x)
        return torch.cat([half, self.cheap[number](half)], dim=1)[:, :channels]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (x + self.ghost(1, self.ghost(0, x, 24).relu(), 16)).relu()


class Partial(nn.Module):
    """Convolutions on the first quarter of the channels, a number that stands in the code (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.quarter, self.wide, self.back = conv(3, 32, 3, 2), conv(8, 8, 3), conv(32, 256), conv(256, 32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, rest = torch.split(x, [8, 24], dim=1)
        x = x + self.back(self.wide(torch.cat([self.quarter(first), rest], dim=1)).relu())
        return self.fc(x.relu().mean((2, 3)))


class NormWithActivation(nn.BatchNorm2d):
    """A norm that holds its activation as a child, as timm's do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class WideHead(nn.Module):
    """After the pooling a convolution to more channels and a norm (MobileNetV4): the stage maps need neither."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 16, 3, 2), nn.Sequential(conv(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.head, self.norm, self.fc = conv(32, 80), NormWithActivation(80), nn.Linear(80, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).mean((2, 3), keepdim=True)
        return self.fc(self.norm(self.head(x)).flatten(1))


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def test_partly_overlapping_shortcuts_are_followed_in_a_time_that_does_not_double_with_every_block():
    channels = trace_channels(Overlapping(24), SIZE)  # 2^24 sets
    assert {space.name for space in channels.spaces} == {f"expand.{number}" for number in range(24)}
    assert channels.widths == (16,) * 24
    assert channels.fixed == ("the output is a slice, channels 31 to 32 of 32",)


def test_channels_that_meet_in_one_layer_go_together():
    network = Ghost()
    pruner = Pruner(network, SIZE)
    # A unit of the sum is one channel of `primary.1` and the one of `cheap.1` made of it: stem channels c and c + 8.
    spaces = {space.name: (space.channels, space.size) for space in pruner.channels.spaces}
    assert spaces == {"stem": (16, 2), "primary.0": (12, 1)}
    assert pruner.channels.fixed == ()
    stem = pruner.channels.axes["stem.weight", 0]
    assert np.array_equal(stem[:8], stem[8:])
    a, b = 8, 5
    narrow = pruner.narrowed((a, b))
    layers = 27 * a + a * b + 9 * b + 2 * b * (a // 2) + 9 * (a // 2)
    assert pruner.cost((a, b)) == (layers * 64, layers)
    assert (count(narrow, SIZE).macs, count(narrow, SIZE).parameters) == (layers * 64, layers)

    inherit([narrow.state_dict()], network.state_dict(), pruner.channels)
    units_left = {STAYS}
    for space, width in zip(pruner.channels.spaces, (a, b), strict=True):
        best = np.argsort(-space.importance, kind="stable")[: width // space.size]
        units_left |= set(space.units[best].tolist())
    silenced = copy.deepcopy(network)
    for (name, dim), units in pruner.channels.axes.items():
        gone = [index for index, unit in enumerate(units.tolist()) if unit not in units_left]
        silenced.state_dict()[name].index_fill_(dim, torch.tensor(gone), 0)
    x_NCHW = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        expected = silenced(x_NCHW)[:, [unit in units_left for unit in pruner.channels.output.tolist()]]
        torch.testing.assert_close(narrow(x_NCHW), expected, rtol=0, atol=1e-5)


def test_sizes_in_the_code_are_named_with_the_share_that_would_do():
    network = External(Partial(), input_size=SIZE)
    with pytest.raises(BudgetError) as caught:
        separate(network, num_classes=5, input_size=SIZE, assistant_share=0.01)
    why = "the input of quarter is split off, in parts of [8, 24] channels"
    assert why in str(caught.value)
    share = float(re.search(r"set student\.assistant_share = (\S+),", str(caught.value))[1])
    separation = separate(network, num_classes=5, input_size=SIZE, assistant_share=share)
    assert separation.cost <= separation.budget
    with pytest.raises(BudgetError):
        separate(network, num_classes=5, input_size=SIZE, assistant_share=share - 0.01)


def test_layers_after_the_last_map_are_not_narrowed_with_it():
    network = External(WideHead(), input_size=SIZE)
    assert network.stages == ("stem", "body")
    separation = separate(network, num_classes=5, input_size=SIZE, round_to=4)
    assert separation.student.channels <= 32
    assert separation.cost <= separation.budget == count(network, SIZE).macs

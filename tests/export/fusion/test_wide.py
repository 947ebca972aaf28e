"""Level wide: branches side by side in one layer each, equal in value to each branch alone, in float64."""

import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional

from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.fusion.layers import merge_convs
from rkd_deploy.export.fusion.wide import merge


def trained_looking(network):
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.dtype.is_floating_point and tensor.ndim == 1:
            low, high = (-0.3, 0.3) if name.endswith(("bias", "mean")) else (0.7, 1.3)
            tensor.data.uniform_(low, high, generator=generator)
    return network.double().eval()


@torch.no_grad()
def assert_merged(branches, size=(32, 64), **options):
    """What is at p_b of the merged map is what branch b alone gives; the layers of the merged network are returned."""
    branches = [trained_looking(branch) for branch in branches]
    merged = merge(branches, **options)
    x_NCHW = torch.randn(2, 3, *size, dtype=torch.float64)
    actual = merged.backbone(x_NCHW)
    places = torch.cat(merged.p)
    assert sorted(places.tolist()) == list(range(actual.shape[1]))
    for branch, p in zip(branches, merged.p, strict=True):
        expected = branch(x_NCHW)
        assert expected.std() > 1e-3
        torch.testing.assert_close(actual[:, p], expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    return merged


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


class Net(nn.Module):
    """A stem and whatever `forward` is given; width C."""

    def __init__(self, channels, rest):
        super().__init__()
        self.stem, self.rest = nn.Conv2d(3, channels, 3, padding=1), rest
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x_NCHW):
        return self.rest(self, self.stem(x_NCHW))


def pair(rest, widths=(4, 6)):
    return [Net(width, rest) for width in widths]


def test_a_shared_input_is_concatenation_without_a_zero():
    convs = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)]
    merged = merge_convs(convs, [torch.arange(3)] * 2, 3, grouped=True)
    assert torch.equal(merged.conv.weight, torch.cat([conv.weight for conv in convs]))
    assert torch.equal(merged.conv.bias, torch.cat([conv.bias for conv in convs]))
    assert [q.tolist() for q in merged.q] == [[0, 1, 2, 3], [4, 5]]


def test_other_layers_are_block_diagonal():
    a, b = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False)
    (weight,) = merge_convs([a, b], [torch.arange(2), torch.arange(2, 5)], 5, grouped=True).conv.parameters()
    expected = torch.block_diag(a.weight[:, :, 0, 0], b.weight[:, :, 0, 0])
    assert torch.equal(weight[:, :, 0, 0], expected)


@pytest.mark.parametrize(("grouped", "groups"), [(False, 1), (True, 2)])
def test_equal_widths_are_grouped_on_request(grouped, groups):
    merged = merge_convs(
        [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)], [torch.arange(4), torch.arange(4, 8)], 8, grouped=grouped
    )
    assert merged.conv.groups == groups
    assert merged.conv.weight.numel() == 2 * 6 * 9 * (8 // groups)


def test_depthwise_convolutions_stay_depthwise_in_any_order_of_their_input():
    convs = [nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(3, 3, 3, groups=3)]
    p = [torch.tensor([4, 1]), torch.tensor([0, 3, 2])]
    merged = merge_convs(convs, p, 5, grouped=False)
    assert (merged.conv.groups, merged.order) == (5, None)
    assert [q.tolist() for q in merged.q] == [[4, 1], [0, 3, 2]]


def test_wide_has_the_layers_of_one_branch(model):
    fused = fuse(model, "wide")
    assert len(convolutions(fused)) == len(convolutions(model.student)) == 9
    assert sum(isinstance(module, nn.ReLU) for module in fused.modules()) == 7


def resnet(widths):
    """torchvision's ResNet with other widths, as pruning leaves it: it builds none itself."""
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)
    before = widths[0]
    network.conv1, network.bn1 = nn.Conv2d(3, before, 7, 2, 3, bias=False), nn.BatchNorm2d(before)
    for layer, width in zip((network.layer1, network.layer2, network.layer3, network.layer4), widths, strict=True):
        (block,) = layer
        stride = block.conv1.stride
        block.conv1, block.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        block.conv2, block.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        if block.downsample is not None:
            block.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride), nn.BatchNorm2d(width))
        before = width
    network.avgpool = network.fc = nn.Identity()
    return Unflattened(network, before)


class Unflattened(nn.Module):
    """torchvision's ResNets and ShuffleNets flatten or pool inside `forward`: their maps without that."""

    def __init__(self, network, channels):
        super().__init__()
        self.network = network

    def forward(self, x_NCHW):
        network = self.network
        x = network.maxpool(network.relu(network.bn1(network.conv1(x_NCHW))))
        return network.layer4(network.layer3(network.layer2(network.layer1(x))))


class ShuffleNet(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.network = torchvision.models.ShuffleNetV2([2, 2, 2], widths, num_classes=2)

    def forward(self, x_NCHW):
        network = self.network
        x = network.stage2(network.maxpool(network.conv1(x_NCHW)))
        return network.conv5(network.stage4(network.stage3(x)))


class Timm(nn.Module):
    def __init__(self, name, **options):
        super().__init__()
        self.network = timm.create_model(name, **options)

    def forward(self, x_NCHW):
        return self.network.forward_features(x_NCHW)


OTHERS = {
    "torchvision resnet": lambda: [resnet((8, 16, 16, 24)), resnet((4, 8, 12, 16))],
    "torchvision mobilenet_v2": lambda: [torchvision.models.mobilenet_v2(width_mult=w).features for w in (0.75, 0.35)],
    "torchvision shufflenet_v2": lambda: [ShuffleNet((8, 16, 24, 32, 32)), ShuffleNet((4, 8, 12, 16, 24))],
    "torchvision densenet": lambda: [torchvision.models.DenseNet(g, (2, 2), 2 * g).features for g in (8, 4)],
    "timm resnet": lambda: [Timm("test_resnet") for _ in range(2)],
    "timm efficientnet": lambda: [Timm("test_efficientnet") for _ in range(2)],  # squeeze and excitation, BatchNormAct
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_networks_of_unequal_widths(name):
    merged = assert_merged(OTHERS[name]())
    if "densenet" not in name:  # normalises what it has concatenated
        assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.backbone.modules())


def test_three_branches_and_a_shortcut_that_one_of_them_projects():
    class Block(nn.Module):
        def __init__(self, channels, project):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3, padding=1)
            self.project = (
                nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if project else None
            )

        def forward(self, x_NCHW):
            x = functional.relu(self.stem(x_NCHW))
            return self.conv(x) + (x if self.project is None else self.project(x))

    merged = assert_merged([Block(4, False), Block(6, True), Block(3, False)])
    assert len(convolutions(merged.backbone)) == 3


KEPT = {
    "in place": lambda net, x: x.relu_() + net.conv(x),  # the convolution reads what was overwritten
    "scaled": lambda net, x: 0.5 * net.conv(x) - x / 2,
    "swapped sum": lambda net, x: torch.cat([x, net.conv(x)], 1) + torch.cat([net.conv(x), x], 1),
    "halves": lambda net, x: net.conv(torch.cat([x.chunk(2, 1)[1], x[:, : x.shape[1] // 2]], 1)),
    "pooled gate": lambda net, x: x * functional.adaptive_avg_pool2d(net.conv(x), 1).sigmoid(),
    "norm of a sum": lambda net, x: functional.relu(net.norm(x + net.conv(x))),
    "norm read twice": lambda net, x: net.norm(y := net.conv(x)) + y,
}


@pytest.mark.parametrize("name", KEPT)
def test_ways_of_writing_a_network(name):
    assert_merged(pair(KEPT[name]))


REFUSED = {
    "is no operation that it knows": lambda net, x: functional.layer_norm(x, x.shape[1:]),
    "reads a map whose data was moved": lambda net, x: net.conv(x.transpose(2, 3)),
    "reads something that is no map": lambda net, x: functional.relu(x.flatten(1)),
    "depends on a tensor or on the size of a map": lambda net, x: functional.interpolate(x, size=x.shape[2:]),
    "gives no map of the same channels": lambda net, x: x.mean(1, keepdim=True),
    "other settings in one branch": lambda net, x: functional.leaky_relu(x, net.stem.out_channels / 10),
    "cannot be traced": lambda net, x: x if x.sum() > 0 else -x,
    "unequal numbers of channels": lambda net, x: x * x[:, :1],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_merged_says_why_and_names_the_way_out(reason):
    with pytest.raises(UsageError, match=f"Level wide cannot merge .*{reason}.*--fuse tail"):
        merge([branch.eval() for branch in pair(REFUSED[reason])])


def test_unequal_topologies_name_both_places():
    branches = [Net(4, lambda net, x: net.conv(x)), Net(4, lambda net, x: functional.relu(x))]
    expected = r"their topologies differ: where one has the layer conv, another has relu\(\) in the network itself"
    with pytest.raises(UsageError, match=expected):
        merge(branches)


def test_a_map_is_made_in_one_piece_once():
    """ShuffleNet's halves are read twice and cut out once; a shuffle costs nothing by itself."""
    merged = assert_merged(pair(lambda net, x: net.conv(y := functional.channel_shuffle(x, 2)) + y))
    code = merged.backbone.code
    assert "channel_shuffle" not in code
    assert len(re.findall("index_select", code)) <= 1

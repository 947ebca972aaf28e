"""Stage maps and heads of others' networks, against plain torch and torchvision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from rkd_deploy.errors import UsageError
from rkd_deploy.models.external import External, PooledHead
from rkd_deploy.models.staged import pool

K = 7


def tv(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=K)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=K
    )


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1, 1, 1], [1, 2, 4, 8], [2, 2], num_classes=K)


def vgg() -> nn.Module:
    return torchvision.models.VGG(nn.Sequential(*list(torchvision.models.vgg11_bn().features)), num_classes=K)


def timm_vit(**settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=K, **settings
    )


def timm_net(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=K)


LINEAR, MODULE, NONE = "linear", "module", "none"
# The last stage's channels and head; and all sizes of maps of a 64 x 64 image, from what is published of each design.
NETWORKS = {
    "tv:resnet18": (tv("resnet18"), 512, (32, 16, 8, 4, 2), LINEAR),
    "tv:resnet50": (tv("resnet50"), 2048, (32, 16, 8, 4, 2), LINEAR),
    "tv:mobilenet_v2": (tv("mobilenet_v2"), 1280, (32, 16, 8, 4, 2), LINEAR),
    "tv:mobilenet_v3_small": (tv("mobilenet_v3_small"), 576, (32, 16, 8, 4, 2), MODULE),
    "tv:efficientnet_b0": (tv("efficientnet_b0"), 1280, (32, 16, 8, 4, 2), LINEAR),
    "tv:densenet121": (tv("densenet121"), 1024, (32, 16, 8, 4, 2), LINEAR),
    "tv:shufflenet_v2_x1_0": (tv("shufflenet_v2_x1_0"), 1024, (32, 16, 8, 4, 2), LINEAR),
    "tv:regnet_y_400mf": (tv("regnet_y_400mf"), 440, (32, 16, 8, 4, 2), LINEAR),
    "tv:convnext_tiny": (tv("convnext_tiny"), 768, (16, 8, 4, 2), MODULE),
    "tv:squeezenet1_1": (
        tv("squeezenet1_1"),
        512,
        (31, 15, 7, 3),
        NONE,
    ),  # a ReLU stands between its convolution and GAP
    "tv:vit": (small_vit, 24, (4,), NONE),
    "tv:swin": (small_swin, 192, (16, 8, 4, 2), LINEAR),
    "timm:regnety_004": (timm_net("regnety_004"), 440, (32, 16, 8, 4, 2), LINEAR),
    "timm:convnext_atto": (timm_net("convnext_atto"), 320, (16, 8, 4, 2), MODULE),
    "timm:mobilenetv3_small_100": (timm_net("mobilenetv3_small_100"), 576, (32, 16, 8, 4, 2), MODULE),
    "timm:vit": (timm_vit(), 24, (4,), NONE),
    "timm:vit without class token": (timm_vit(class_token=False, global_pool="avg"), 24, (4,), MODULE),
    "timm:vit with registers": (timm_vit(reg_tokens=4, global_pool="avg"), 24, (4,), MODULE),
    "timm:mobilevit_xxs": (timm_net("mobilevit_xxs"), 320, (32, 16, 8, 4, 2), LINEAR),
    "timm:swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1), num_classes=K
        ),
        768,
        (16, 8, 4, 2),
        LINEAR,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_maps_logits_and_head(name):
    make, channels, sizes, head = NETWORKS[name]
    network = make()
    x = torch.randn(3, 3, 64, 64)
    expected = copy.deepcopy(network).eval()(x)
    external = External(network, input_size=64).eval()
    torch.testing.assert_close(external(x), expected)
    maps, logits = external.maps_and_logits(x)
    torch.testing.assert_close(logits, expected)
    assert [map_.shape[2:] for map_ in maps] == [(size, size) for size in sizes], external.stages
    assert (external.channels, external.num_classes) == (channels, K)
    assert {type(external.fc)} == {{LINEAR: nn.Linear, MODULE: PooledHead, NONE: type(None)}[head]}
    if external.fc is not None:
        torch.testing.assert_close(external.fc(pool(maps[-1])), expected, rtol=1e-4, atol=1e-5)

    bare = external.without_head()
    for stage_map, other in zip(maps, bare.features(x), strict=True):
        torch.testing.assert_close(stage_map, other)
    torch.testing.assert_close(bare(x), pool(maps[-1]))
    assert bare.fc is None
    names = {key for key, _ in bare.network.named_parameters()}
    assert names < {key for key, _ in network.named_parameters()}  # the same names, without the head's


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
@torch.no_grad()
def test_maps_are_those_of_torchvisions_own_extraction(name):
    network, x = tv(name)().eval(), torch.randn(2, 3, 64, 64)
    external = External(network, input_size=64)
    theirs = torchvision.models.feature_extraction.create_feature_extractor(network, list(external.stages))(x)
    for ours, stage in zip(external.features(x), external.stages, strict=True):
        torch.testing.assert_close(ours, theirs[stage])


@torch.no_grad()
def test_tokens_become_a_map_row_by_row():
    network, x = timm_vit(reg_tokens=2)().eval(), torch.randn(2, 3, 64, 64)
    [map_] = External(network, ["blocks.0"], input_size=64).features(x)
    tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
    tokens = network.blocks[0](tokens)
    assert tokens.shape == (2, 1 + 2 + 16, 24)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(map_[:, :, row, column], tokens[:, 3 + 4 * row + column])


@torch.no_grad()
def test_channels_last_maps_are_permuted():
    network, x = small_swin().eval(), torch.randn(2, 3, 64, 64)
    maps = External(network, ["features.1", "features.3"], input_size=64).features(x)
    by_hand = network.features[1](network.features[0](x))
    torch.testing.assert_close(maps[0], by_hand.permute(0, 3, 1, 2))
    assert maps[1].shape == (2, 48, 8, 8)


class Plain(nn.Module):
    """A network as people write them: nameless ReLUs between the lines, and one reused layer."""

    def __init__(self, num_classes: int = K, halt: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, padding=1)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.5)
        self.out = nn.Linear(16, num_classes)
        self.halt = halt

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        if self.halt and not bool(x.isfinite().all()):  # no tracer gets past this
            raise ValueError
        x = relu(self.two(x)) if not self.halt else self.relu(self.two(x))
        return self.out(self.dropout(adaptive_avg_pool2d(x, 1).flatten(1)))


@pytest.mark.parametrize("halt", [False, True])
@torch.no_grad()
def test_a_users_network(halt):
    network, x = Plain(halt=halt).eval(), torch.randn(2, 3, 16, 16)
    external = External(network, input_size=16)
    first = network.one(x).relu()
    last = network.two(first).relu()
    # Hooks see a reused layer under one name, its last call: the first stage ends before it then.
    torch.testing.assert_close(external.features(x)[-1], last)
    if not halt:
        assert external.stages == ("relu", "relu_1")
        torch.testing.assert_close(external.features(x)[0], first)
    assert external.fc is network.out
    bare = external.without_head()
    torch.testing.assert_close(bare(x), pool(last))
    assert isinstance(bare.network.out, nn.Identity)


def test_training_drops_and_evaluation_does_not():
    external = External(Plain(), input_size=16)
    x = torch.randn(4, 3, 16, 16)
    _, logits = external.train().maps_and_logits(x)
    _, other = external.maps_and_logits(x)
    assert not torch.allclose(logits, other)
    _, logits = external.eval().maps_and_logits(x)
    _, other = external.maps_and_logits(x)
    torch.testing.assert_close(logits, other, rtol=0, atol=0)


def test_what_is_seen_is_the_network_itself_moved_copied_and_trained():
    external = External(Plain(), input_size=16)
    twin = copy.deepcopy(external).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        twin.network.two.weight.zero_()
        torch.testing.assert_close(
            twin.features(x)[-1], twin.network.two.bias.relu()[None, :, None, None].expand(2, 16, 8, 8)
        )
    assert external.network.two.weight.abs().sum() > 0
    external.features(x.float())[-1].sum().backward()
    assert external.network.one.weight.grad is not None
    assert external.network.out.weight.grad is None


def test_a_head_of_zeros_agrees_with_everything_and_is_not_believed():
    network = small_vit()
    nn.init.zeros_(network.heads.head.weight)
    before = copy.deepcopy(network.state_dict())
    assert External(network, input_size=64).fc is None
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_modes_and_random_numbers_are_left_as_they_were():
    network = tv("resnet18")()
    network.layer1.eval()
    state = torch.get_rng_state()
    External(network, input_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert (network.training, network.layer1.training, network.layer2.training) == (True, False, True)
    assert network.bn1.num_batches_tracked == 0


def test_stages_do_not_depend_on_the_size_of_the_images():
    network = tv("mobilenet_v2")()
    assert External(network, input_size=32).stages == External(network, input_size=(96, 128)).stages


@torch.no_grad()
def test_another_network_of_the_topology_is_seen_in_the_same_way():
    original = External(tv("resnet18")(), ["layer2", "layer3"], input_size=32)
    narrow = torchvision.models.resnet18(num_classes=K, norm_layer=lambda width: nn.GroupNorm(2, width))
    again = original.rewrapped(narrow)
    assert (again.stages, again.channels, again.network) == (("layer2", "layer3"), 256, narrow)
    assert again.fc is None  # layer4 stands between its pooled last map and the logits
    assert original.without_head().rewrapped(narrow).num_classes is None


def test_wrong_stages_are_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"\['layer9', 'fc'\] of the network ResNet .*layer3 256x2x2, layer4 512x1x1"):
        External(tv("resnet18")(), ["layer2", "layer9", "fc"], input_size=32)


def test_images_that_a_network_cannot_take_are_refused():
    with pytest.raises(UsageError, match="does not run on RGB images of 32 x 32 pixels"):
        External(small_vit(), input_size=32)


def test_a_network_without_maps_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, K))
    with pytest.raises(UsageError, match="No stage map was found in the network Sequential"):
        External(flat, input_size=8)


def test_an_answer_that_is_no_logits_is_refused():
    with pytest.raises(UsageError, match="must give logits"):
        External(nn.Sequential(nn.Conv2d(3, 8, 3)), input_size=16)
    with pytest.raises(UsageError, match="must give logits"):
        External(torchvision.models.googlenet(num_classes=K, aux_logits=True, init_weights=False), input_size=64)

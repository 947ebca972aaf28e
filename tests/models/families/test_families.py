"""What every family promises: stage maps, other widths, a separation that learns."""

from __future__ import annotations

from functools import cache
from math import lcm

import pytest
import torch
from torch import nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.mobilenet import MobileNetV2
from rkd_deploy.models.families.resnet50 import ResNet50
from rkd_deploy.models.families.shufflenet import ShuffleNetV1, ShuffleNetV2, shuffled
from rkd_deploy.models.families.vgg import VGG
from rkd_deploy.models.families.wide_resnet import WideResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import Separation, separate
from rkd_deploy.models.staged import Staged, pool

MAPS = {
    "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
    "vgg8": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (1280, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (1024, 4)],
    "shufflenetv2_1_5": [(176, 16), (352, 8), (1024, 4)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
}


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_stage_maps_and_head(name: str) -> None:
    model = zoo.create(name, 7).eval()
    x_NCHW = torch.randn(2, 3, 32, 32)
    maps = model.features(x_NCHW)
    assert [tuple(f.shape) for f in maps] == [(2, channels, size, size) for channels, size in MAPS[name]]
    assert model.channels == MAPS[name][-1][0]
    assert (maps[-1] >= 0).all()  # after the last activation
    assert model.fc is not None
    torch.testing.assert_close(model(x_NCHW), maps[-1].mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


NARROW: dict[str, Staged] = {
    "wrn": WideResNet(10, (4, 5, 6, 7), 3),
    "vgg": VGG((1, 1, 1, 1, 2), (4, 5, 6, 7, 8), 3),
    "mobilenetv2": MobileNetV2((4, 5, 6, 7, 8, 8, 10, 11, 12), 3),
    "shufflenetv1": ShuffleNetV1((12, 24, 12, 36), 3),
    "shufflenetv2": ShuffleNetV2((4, 6, 8, 10, 12), 3),
    "resnet50": ResNet50((4, 5, 6, 7, 8), 3),
}


@pytest.mark.parametrize("original", NARROW.values(), ids=NARROW)
@torch.no_grad()
def test_rebuilt_is_the_same_network_with_fresh_weights(original: Staged) -> None:
    same, bare = original.rebuilt(original.widths, 3), original.rebuilt(original.widths, None).eval()
    assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    assert not torch.equal(next(same.parameters()), next(original.parameters()))
    assert bare.fc is None
    x_NCHW = torch.randn(2, 3, 16, 16)
    assert torch.equal(bare(x_NCHW), pool(bare.features(x_NCHW)[-1]))
    bare.load_state_dict(original.state_dict(), strict=False)  # all but the head
    assert torch.equal(original.eval().features(x_NCHW)[-1], bare.features(x_NCHW)[-1])


@pytest.mark.parametrize("original", NARROW.values(), ids=NARROW)
def test_widths_that_cannot_be_are_refused(original: Staged) -> None:
    for widths in (original.widths[1:], (*original.widths, 12), (0, *original.widths[1:])):
        with pytest.raises(UsageError, match=rf"widths = .* must be {len(original.widths)} positive channel counts"):
            original.rebuilt(widths, 3)


@pytest.mark.parametrize(("name", "rule"), [("shufflenetv1", 12), ("shufflenetv2", 2)])
def test_widths_that_groups_do_not_divide_are_refused(name: str, rule: int) -> None:
    widths = NARROW[name]
    with pytest.raises(UsageError, match=rf"positive channel counts, multiples of {rule}: the stem's"):
        widths.rebuilt((*widths.widths[:-1], widths.widths[-1] + 1), 3)


@pytest.mark.parametrize("depth", [4, 6, 15, 20])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(UsageError, match=rf"depth = {depth} is not 6n \+ 4"):
        WideResNet(depth, (16, 16, 32, 64), 10)


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg8", "mobilenetv2", "resnet50"])
def test_fresh_weights_are_those_published(name: str) -> None:
    """He et al.: variance 2 / (kernel area x output channels), also where a convolution is depthwise."""
    model = zoo.create(name, 10)
    large = max((m for m in model.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 100]
    for layer in (large, *wide[-1:]):
        area = layer.kernel_size[0] * layer.kernel_size[1]
        std = float(layer.weight.detach().std())
        assert std == pytest.approx((2 / (area * layer.out_channels)) ** 0.5, rel=0.05)
        assert layer.bias is None or not layer.bias.any()
    assert model.fc is not None
    if name in ("vgg8", "mobilenetv2"):
        assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert bool(model.fc.bias.any()) == (name == "resnet50")  # PyTorch's own there, 0 elsewhere


def test_a_shuffle_mixes_the_groups() -> None:
    map_NCHW = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffled(map_NCHW, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert shuffled(map_NCHW, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_an_identity_does_not_come_and_go_with_the_widths() -> None:
    """Groups of equal widths add no shortcut to MobileNetV2 and take no projection from ResNet-50."""
    blocks = [block for group in MobileNetV2((8,) * 9, None).blocks for block in group]
    assert [block.identity for block in blocks] == [n > 0 for blocks_ in (1, 2, 3, 4, 3, 3, 1) for n in range(blocks_)]
    assert ResNet50((32, 8, 8, 8, 8), None).layer1[0].shortcut is not None


SEPARATED = ("resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50")
C_T = 64  # of a ResNet-56


@cache
def separation(name: str) -> Separation:
    """S and A of a network, once: finding the widths takes seconds."""
    return separate(name, num_classes=10, input_size=32, round_to=8, channels=C_T)


def shipped(name: str, student: Staged | None = None) -> ResidualStudent:
    """S + A as they ship."""
    cut = separation(name)
    return ResidualStudent(student or cut.student, cut.assistants, C_T, 10)


@pytest.mark.parametrize("name", SEPARATED)
def test_separation_keeps_the_budget(name: str) -> None:
    cut, s0 = separation(name), zoo.create(name, 10)
    assert cut.budget == count(s0, 32).macs
    assert count(shipped(name), 32).macs == cut.cost <= cut.budget
    assert cut.parts["assistant"] + cut.parts["assistant_adapter"] <= 0.2 * cut.budget
    step = lcm(8, s0.multiple_of)
    for network in (cut.student, cut.assistant):
        assert all(w % step == 0 or w == full for w, full in zip(network.widths, s0.widths, strict=True))
        assert all(w <= full for w, full in zip(network.widths, s0.widths, strict=True))


@pytest.mark.parametrize("name", SEPARATED)
def test_no_width_of_the_student_could_be_a_step_wider(name: str) -> None:
    cut, s0 = separation(name), zoo.create(name, 10)
    step = lcm(8, s0.multiple_of)
    for index, (width, full) in enumerate(zip(cut.student.widths, s0.widths, strict=True)):
        wider = list(cut.student.widths)
        wider[index] = min(full, width + step)
        if wider[index] > width:
            assert count(shipped(name, s0.rebuilt(wider, None)), 32).macs > cut.budget, (index, wider)


@pytest.mark.parametrize("name", SEPARATED)
def test_what_was_separated_learns(name: str) -> None:
    cut = separation(name)
    student, assistant = (part.rebuilt(part.widths, None) for part in (cut.student, cut.assistant))
    model = ResidualStudent(student, [assistant], C_T, 10)
    x_NCHW, y_N = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)  # the gradient is steep: batch norm of four images
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x_NCHW), y_N)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(torch.tensor(losses).isfinite())
    assert losses[1] < losses[0]
    assert model.eval()(x_NCHW).isfinite().all()


def test_the_steps_of_a_grouped_network_are_multiples_of_its_groups_too() -> None:
    for network in (separation("shufflenetv1").student, separation("shufflenetv1").assistant):
        assert {width % 24 for width in network.widths} == {0}  # 24 = lcm(8, 12)

"""S and A exchanging maps: the equations written again, the cut of every family, its cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.progressive import ProgressiveStudent, adapter_cost, paired_channels, progressive_student
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.staged import Staged, stage_shapes

FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50"]
CHANNELS = (6, 7, 9)


def made(assistants: int = 1) -> ProgressiveStudent:
    """In float64, every number random, A too. The second map of S has T's channels: no adapter back to it."""
    chain = [CifarResNet(8, (2, 3, 4, 5), None) for _ in range(assistants)]
    model = progressive_student(CifarResNet(8, (4, 4, 7, 8), None), chain, CHANNELS, 5, (8, 8)).double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.4, 0.4)
            tensor.data.uniform_(low, high)
    return model


def by_matrices(model: ProgressiveStudent, x: Tensor, branches: int) -> Tensor:
    """z of the first branches, adapters as einsum."""

    def apply(layer: nn.Module, s: Tensor) -> Tensor:
        if isinstance(layer, nn.Identity):
            return s
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        return torch.einsum("oc,nchw->nohw", layer.weight[:, :, 0, 0], s) + layer.bias[:, None, None]

    s = x
    for row in model.rows():
        s = torch.stack([apply(step.adapter, step.stage(apply(step.back, s))) for step in row[:branches]]).sum(0)
    return s.mean((2, 3)) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("assistants", [1, 2])
@torch.no_grad()
def test_the_network_is_the_equations(assistants: int) -> None:
    model, x = made(assistants), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = by_matrices(model, x, 1 + assistants)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert (expected - by_matrices(model, x, assistants)).abs().max() > 1e-3  # the last one does matter
    torch.testing.assert_close(model.alone()(x), by_matrices(model, x, 1), rtol=0, atol=1e-12)
    before = model.summed_map(x, len(model.steps) - 1)
    last_maps = [stage.map(before) for stage in model.rows()[-1]]
    total = sum(P(f) for P, f in zip(model.last_adapters(), last_maps, strict=True))
    torch.testing.assert_close(total, model.summed_map(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.features(x)[-1], last_maps[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_fresh_assistant_adds_exactly_nothing_at_any_stage() -> None:
    student, assistant = CifarResNet(8, (4, 4, 7, 8), None), CifarResNet(8, (2, 3, 4, 5), None)
    model = progressive_student(student, [assistant], CHANNELS, 5, (8, 8)).eval()
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(model(x), model.alone()(x))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_stages_of_every_family_are_its_features(name: str) -> None:
    network = zoo.create(name, 10)
    narrow = network.rebuilt(tuple(max(network.multiple_of, 8 * network.multiple_of) for _ in network.widths), None)
    for layer in narrow.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
    keys, x = set(narrow.state_dict()), torch.randn(2, 3, 16, 16)
    maps, f = narrow.eval().features(x), x
    for stage, expected in zip(narrow.stages(), maps, strict=True):
        f = stage(f)
        torch.testing.assert_close(f, expected)
    assert set(narrow.state_dict()) == keys  # cutting leaves the network as it is


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    class Whole(Staged):
        def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
            return (x_NCHW,)

        def rebuilt(self, widths: object, num_classes: int | None) -> Staged:
            return self

    with pytest.raises(UsageError, match=r"Whole cannot be cut into stages: .*sequential"):
        Whole().stages()


def test_maps_are_paired_from_the_deepest() -> None:
    three, four = [(4, 8, 8), (5, 4, 4), (6, 2, 2)], [(1, 9, 9), (2, 8, 8), (3, 4, 4), (7, 2, 2)]
    assert paired_channels(three, four) == [4, 5, 6]  # S0's first two stages are one
    assert paired_channels(four, three) == [2, 3, 7]  # T's first is left out
    student = zoo.create("vgg8", 10).rebuilt((4, 4, 4, 4, 4), None)
    model = progressive_student(student, [student.rebuilt((4, 4, 4, 4, 4), None)], [4, 5, 6], 10, (16, 16))
    assert len(model.steps) == 3
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_account_of_the_adapters_by_hand(unit: str) -> None:
    maps = [(4, 8, 8), (7, 4, 4), (8, 2, 2)]
    # P: 4 to 6, 7 to 7, 8 to 9; Q: 6 to 4 on the first map; none on the second, which has T's channels.
    macs = 64 * (4 * 6 + 6 * 4) + 16 * 7 * 7 + 4 * 8 * 9
    params = (4 * 6 + 6) + (6 * 4 + 4) + (7 * 7 + 7) + (8 * 9 + 9)
    assert adapter_cost(maps, CHANNELS, unit) == (macs if unit == "macs" else params)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_separation_pays_for_every_adapter(name: str, unit: str) -> None:
    channels, size = (24, 40, 72), (16, 16)
    how = {"num_classes": 10, "input_size": size, "budget": unit}
    whole = separate(name, stage_channels=channels, channels=channels[-1], **how)
    model = progressive_student(whole.student, whole.assistants, channels, 10, size)
    cost = count(model, size)
    assert (cost.macs if unit == "macs" else cost.parameters) == whole.cost <= whole.budget
    assert count(zoo.create(name, 10), size).macs >= cost.macs or unit == "params"
    last_only = separate(name, channels=channels[-1], **how)
    assert whole.parts["student_adapter"] > last_only.parts["student_adapter"]
    assert whole.parts["student"] <= last_only.parts["student"]  # what is paid is missing there
    shapes = [stage_shapes(branch, size) for branch in (whole.student, whole.assistant)]
    assert [adapter_cost(maps, channels, unit) for maps in shapes] == [
        whole.parts["student_adapter"],
        whole.parts["assistant_adapter"],
    ]

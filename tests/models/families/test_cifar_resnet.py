from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rkd_deploy.errors import UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.families.cifar_resnet import FAMILY, CifarResNet
from rkd_deploy.models.staged import pool


def test_the_names_are_those_of_the_papers() -> None:
    narrow = {f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)}
    assert set(FAMILY) == narrow | {f"resnet{depth}x4" for depth in (8, 14, 20, 32)}


@pytest.mark.parametrize("name", ["resnet8", "resnet14x4"])
@pytest.mark.parametrize("size", [(32, 32), (12, 20), (7, 9)])
def test_stage_maps_halve_and_have_the_widths(name: str, size: tuple[int, int]) -> None:
    model = zoo.create(name, 10).eval()
    with torch.no_grad():
        maps = model.features(torch.randn(2, 3, *size))
        logits = model(torch.randn(2, 3, *size))
    halves = [size, *(tuple(-(-side // factor) for side in size) for factor in (2, 4))]  # rounded up
    assert [tuple(f.shape) for f in maps] == [
        (2, width, *half) for width, half in zip(model.widths[1:], halves, strict=True)
    ]
    assert model.channels == model.widths[-1] == maps[-1].shape[1]
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3), ("resnet56", 9), ("resnet110", 18)])
def test_depth_is_6n_plus_2(name: str, blocks: int) -> None:
    model = zoo.create(name, 10)
    assert isinstance(model, CifarResNet)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [blocks] * 3
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 6 * blocks + 2  # with the linear one


def test_shortcuts_are_projections_only_where_the_shape_changes() -> None:
    def projections(model: CifarResNet) -> list[bool]:
        return [block.downsample is not None for stage in (model.layer1, model.layer2, model.layer3) for block in stage]

    assert projections(CifarResNet(14, (16, 16, 32, 64), 10)) == [False, False, True, False, True, False]
    assert projections(CifarResNet(14, (8, 16, 16, 16), 10)) == [True, False, True, False, True, False]


def test_without_a_head_the_pooled_map_comes_out() -> None:
    model = CifarResNet(8, (4, 4, 4, 6), None).eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), pool(model.features(x)[-1]))
        assert model(x).shape == (3, 6)


def test_pooling_is_the_mean_over_height_and_width() -> None:
    map_NCHW = torch.arange(24.0).view(1, 2, 3, 4)
    assert pool(map_NCHW).tolist() == [[5.5, 17.5]]


def test_rebuilt_keeps_the_depth_and_takes_the_widths() -> None:
    original = zoo.create("resnet20", 100)
    narrow = original.rebuilt((4, 5, 6, 7), 3)
    assert narrow.widths == (4, 5, 6, 7)
    assert narrow.fc is not None
    assert narrow.fc.weight.shape == (3, 7)
    same = original.rebuilt(original.widths, 100)
    assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    assert not torch.equal(next(same.parameters()), next(original.parameters()))  # fresh weights


@pytest.mark.parametrize("depth", [2, 7, 9, 10, 15])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(UsageError, match=rf"depth = {depth} is not 6n \+ 2"):
        CifarResNet(depth, (16, 16, 32, 64), 10)


@pytest.mark.parametrize("widths", [(16, 16, 32), (16, 16, 32, 64, 128), (0, 16, 32, 64)])
def test_widths_that_cannot_be_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"must be 4 positive channel counts"):
        CifarResNet(8, widths, 10)


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 278_324), ("resnet56", 861_620)])
def test_public_checkpoints_load_as_they_are(shared_data: Path, name: str, parameters: int) -> None:
    state = torch.load(shared_data / "weights" / f"cifar100_{name}.pth", map_location="cpu", weights_only=True)
    model = zoo.create(name, 100)
    model.load_state_dict(state, strict=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        zoo.create("resnet14", 100).load_state_dict(state, strict=True)

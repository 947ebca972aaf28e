from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import FAMILY, CifarResNet

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


class Does(nn.Module):
    """Applies a function; the layer is there to have something counted."""

    def __init__(self, function: Any, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Any:
        return self.function(x if self.layer is None else self.layer(x))


# Published, as far as the digits go: million multiply-adds at 32x32 with 100 classes.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet56", 125.75), ("resnet110", 253.16), ("resnet8x4", 177.07), ("resnet32x4", 1083.04), ("resnet20", 40.82)],
)
def test_published_macs(name: str, millions: float) -> None:
    assert count(zoo.create(name, 100), 32).macs / 1e6 == pytest.approx(millions, abs=0.005)


def test_resnet20_to_the_last_multiply_add() -> None:
    assert count(zoo.create("resnet20", 100), 32).macs == 40_818_944


@pytest.mark.parametrize("name", FAMILY)
def test_every_network_equals_the_closed_form_and_leaves_nothing_out(name: str, closed_form: Any) -> None:
    depth, widths = int(name.removeprefix("resnet").removesuffix("x4")), WIDE if name.endswith("x4") else NARROW
    cost = count(zoo.create(name, 100), 32)
    assert cost.macs == closed_form.macs(depth, widths, 100)
    assert cost.parameters == closed_form.parameters(depth, widths, 100)
    assert cost.unsupported == ()


@settings(max_examples=25)
@given(
    depth=st.sampled_from([8, 14]),
    widths=st.tuples(*[st.integers(1, 40)] * 4),
    classes=st.none() | st.integers(1, 20),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_widths_equal_the_closed_form(
    closed_form: Any, depth: int, widths: tuple[int, ...], classes: int | None, size: tuple[int, int]
) -> None:
    cost = count(CifarResNet(depth, widths, classes), size)
    assert cost.macs == closed_form.macs(depth, widths, classes, size)
    assert cost.parameters == closed_form.parameters(depth, widths, classes)


def test_the_closed_form_says_no_to_one_convolution_more(closed_form: Any) -> None:
    model = CifarResNet(8, NARROW, 10)
    weight = torch.zeros(16, 16, 1, 1)
    model.layer1.append(Does(lambda x: nn.functional.conv2d(x, weight.to(x.device))))
    assert count(model, 32).macs - closed_form.macs(8, NARROW, 10) == 16 * 16 * 32 * 32


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(3, 8, 5, stride=2), 5 * 5 * 3 * 8 * 6 * 6),
        (nn.Conv2d(3, 6, 3, groups=3, padding=1), 3 * 3 * 1 * 6 * 16 * 16),
        (nn.Conv2d(3, 6, (1, 3), dilation=2), 1 * 3 * 3 * 6 * 16 * 12),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), 2 * 2 * 3 * 4 * 16 * 16),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), 768 * 10),
        (nn.Linear(16, 5), 3 * 16 * 16 * 5),
        (nn.BatchNorm2d(3), 0),
        (nn.MaxPool2d(2), 0),
    ],
)
def test_single_layers(layer: nn.Module, macs: int) -> None:
    cost = count(layer, 16)
    assert (cost.macs, cost.unsupported) == (macs, ())
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: x @ x.transpose(-1, -2), 3 * 8 * 8 * 8),
        (lambda x: torch.bmm(x[0], x[0]), 3 * 8 * 8 * 8),
        (lambda x: torch.einsum("nchw,nkhw->nck", x, x), 3 * 3 * 8 * 8),
        (lambda x: nn.functional.linear(x, x[0, 0]), 3 * 8 * 8 * 8),
    ],
)
def test_products_outside_of_any_layer_count(function: Any, macs: int) -> None:
    cost = count(Does(function), 8)
    assert (cost.macs, cost.unsupported) == (macs, ())


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x.cumprod(1), "cumprod"),
        (torch.fft.rfft2, "_fft_r2c"),
        (lambda x: x.sort()[0], "sort"),
        (lambda x: x[0, 0] @ x[0, 0, 0], "mv"),
    ],
)
def test_an_operator_that_nothing_is_known_of_is_reported(function: Any, operator: str) -> None:
    cost = count(Does(function, nn.Conv2d(3, 3, 1)), 8)
    assert cost.unsupported == (operator,)
    assert cost.macs == 3 * 3 * 8 * 8  # what is known still counts


def test_the_module_is_left_as_it_was() -> None:
    model = CifarResNet(8, NARROW, 10).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, 32)
    assert model.training
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_weights_are_counted_once_and_their_work_twice() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    cost = count(nn.Sequential(layer, layer), 4)
    assert (cost.parameters, cost.macs) == (9, 2 * 9 * 16)

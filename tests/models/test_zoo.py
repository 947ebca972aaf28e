"""The networks of the standard table, against sums and names from papers and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rkd_deploy.errors import CheckpointError, UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.train.checkpoints import load_checkpoint
from rkd_deploy.train.weights import load_weights

K = 100
WEIGHT, BIASED = ("weight",), ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Layer(NamedTuple):
    """A layer by its name in the public checkpoint; multiply-adds at 32x32."""

    name: str
    keys: tuple[str, ...]
    macs: int
    parameters: int


def conv(name: str, cin: int, cout: int, kernel: int, size: int, groups: int = 1, bias: bool = False) -> Layer:
    """A convolution whose output is size x size."""
    weights = kernel * kernel * cin // groups * cout
    return Layer(name, BIASED if bias else WEIGHT, weights * size * size, weights + (cout if bias else 0))


def norm(name: str, channels: int) -> Layer:
    """Scale and shift of a batch norm."""
    return Layer(name, NORM, 0, 2 * channels)


def linear(name: str, channels: int) -> Layer:
    """The head."""
    return Layer(name, BIASED, channels * K, channels * K + K)


def wrn(depth: int, k: int) -> Iterator[Layer]:
    yield conv("conv1", 3, 16, 3, 32)
    cin = 16
    for stage, (cout, size) in enumerate([(16 * k, 32), (32 * k, 16), (64 * k, 8)], start=1):
        for block in range((depth - 4) // 6):
            at = f"block{stage}.layer.{block}"
            yield norm(f"{at}.bn1", cin)
            yield conv(f"{at}.conv1", cin, cout, 3, size)
            yield norm(f"{at}.bn2", cout)
            yield conv(f"{at}.conv2", cout, cout, 3, size)
            if cin != cout:
                yield conv(f"{at}.convShortcut", cin, cout, 1, size)
            cin = cout
    yield norm("bn1", cin)
    yield linear("fc", cin)


def vgg(*blocks: int) -> Iterator[Layer]:
    cin = 3
    for number, (convolutions, cout, size) in enumerate(
        zip(blocks, (64, 128, 256, 512, 512), (32, 16, 8, 4, 4), strict=True)
    ):
        for index in range(convolutions):
            yield conv(f"block{number}.{3 * index}", cin, cout, 3, size, bias=True)
            yield norm(f"block{number}.{3 * index + 1}", cout)
            cin = cout
    yield linear("classifier", 512)


def mobilenetv2() -> Iterator[Layer]:
    yield conv("conv1.0", 3, 16, 3, 16)
    yield norm("conv1.1", 16)
    cin = before = 16
    rows = [(1, 8, 1, 16), (6, 12, 2, 16), (6, 16, 3, 8), (6, 32, 4, 4), (6, 48, 3, 4), (6, 80, 3, 2), (6, 160, 1, 2)]
    for group, (expansion, cout, blocks, size) in enumerate(rows):
        for block in range(blocks):
            at, hidden = f"blocks.{group}.{block}.conv", cin * expansion
            yield conv(f"{at}.0", cin, hidden, 1, before)
            yield norm(f"{at}.1", hidden)
            yield conv(f"{at}.3", hidden, hidden, 3, size, groups=hidden)
            yield norm(f"{at}.4", hidden)
            yield conv(f"{at}.6", hidden, cout, 1, size)
            yield norm(f"{at}.7", cout)
            cin, before = cout, size
    yield conv("conv2.0", 160, 1280, 1, 2)
    yield norm("conv2.1", 1280)
    yield linear("classifier.0", 1280)


def shufflenetv1() -> Iterator[Layer]:
    yield conv("conv1", 3, 24, 1, 32)
    yield norm("bn1", 24)
    cin, before = 24, 32
    for stage, (channels, blocks, size) in enumerate([(240, 4, 16), (480, 8, 8), (960, 4, 4)], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            cout = channels - cin if block == 0 else channels  # the pooled input is appended
            narrow = cout // 4
            yield conv(f"{at}.conv1", cin, narrow, 1, before, groups=1 if cin == 24 else 3)
            yield norm(f"{at}.bn1", narrow)
            yield conv(f"{at}.conv2", narrow, narrow, 3, size, groups=narrow)
            yield norm(f"{at}.bn2", narrow)
            yield conv(f"{at}.conv3", narrow, cout, 1, size, groups=3)
            yield norm(f"{at}.bn3", cout)
            cin, before = channels, size
    yield linear("linear", 960)


def shufflenetv2(*stages: int) -> Iterator[Layer]:
    yield conv("conv1", 3, 24, 1, 32)
    yield norm("bn1", 24)
    cin, before = 24, 32
    for stage, (channels, units, size) in enumerate(zip(stages, (3, 7, 3), (16, 8, 4), strict=True), start=1):
        at, half = f"layer{stage}.0", channels // 2
        yield conv(f"{at}.conv1", cin, cin, 3, size, groups=cin)
        yield norm(f"{at}.bn1", cin)
        yield conv(f"{at}.conv2", cin, half, 1, size)
        yield norm(f"{at}.bn2", half)
        yield conv(f"{at}.conv3", cin, half, 1, before)
        yield norm(f"{at}.bn3", half)
        yield conv(f"{at}.conv4", half, half, 3, size, groups=half)
        yield norm(f"{at}.bn4", half)
        yield conv(f"{at}.conv5", half, half, 1, size)
        yield norm(f"{at}.bn5", half)
        for unit in range(1, units + 1):
            at = f"layer{stage}.{unit}"
            yield conv(f"{at}.conv1", half, half, 1, size)
            yield norm(f"{at}.bn1", half)
            yield conv(f"{at}.conv2", half, half, 3, size, groups=half)
            yield norm(f"{at}.bn2", half)
            yield conv(f"{at}.conv3", half, half, 1, size)
            yield norm(f"{at}.bn3", half)
        cin, before = channels, size
    yield conv("conv2", cin, 1024, 1, 4)
    yield norm("bn2", 1024)
    yield linear("linear", 1024)


def resnet50() -> Iterator[Layer]:
    yield conv("conv1", 3, 64, 3, 32)
    yield norm("bn1", 64)
    cin, before = 64, 32
    for stage, (blocks, width, size) in enumerate([(3, 64, 32), (4, 128, 16), (6, 256, 8), (3, 512, 4)], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            yield conv(f"{at}.conv1", cin, width, 1, before)
            yield norm(f"{at}.bn1", width)
            yield conv(f"{at}.conv2", width, width, 3, size)
            yield norm(f"{at}.bn2", width)
            yield conv(f"{at}.conv3", width, 4 * width, 1, size)
            yield norm(f"{at}.bn3", 4 * width)
            if block == 0:
                yield conv(f"{at}.shortcut.0", cin, 4 * width, 1, size)
                yield norm(f"{at}.shortcut.1", 4 * width)
            cin, before = 4 * width, size
    yield linear("linear", 2048)


LAYERS = {
    "wrn_16_1": list(wrn(16, 1)),
    "wrn_16_2": list(wrn(16, 2)),
    "wrn_40_1": list(wrn(40, 1)),
    "wrn_40_2": list(wrn(40, 2)),
    "vgg8": list(vgg(1, 1, 1, 1, 1)),
    "vgg11": list(vgg(1, 1, 2, 2, 2)),
    "vgg13": list(vgg(2, 2, 2, 2, 2)),
    "vgg16": list(vgg(2, 2, 3, 3, 3)),
    "vgg19": list(vgg(2, 2, 4, 4, 4)),
    "mobilenetv2": list(mobilenetv2()),
    "shufflenetv1": list(shufflenetv1()),
    "shufflenetv2": list(shufflenetv2(116, 232, 464)),
    "shufflenetv2_1_5": list(shufflenetv2(176, 352, 704)),
    "resnet50": list(resnet50()),
}


def test_every_network_has_its_sum() -> None:
    """The ResNets of depth 6n + 2 have theirs in test_cost."""
    assert set(zoo.network_names()) - {name for name in zoo.network_names() if name.startswith("resnet")} == set(
        LAYERS
    ) - {"resnet50"}


@pytest.mark.parametrize("name", LAYERS)
def test_cost_equals_the_sum_written_out(name: str) -> None:
    cost = count(zoo.create(name, K), 32)
    assert cost.macs == sum(layer.macs for layer in LAYERS[name])
    assert cost.parameters == sum(layer.parameters for layer in LAYERS[name])
    assert cost.unsupported == ()


def test_every_name_stands_in_the_page_of_recipes() -> None:
    page = (Path(__file__).parents[2] / "train/README.md").read_text(encoding="utf-8")
    table = page.split("are one of:")[1].split("They are")[0]
    assert re.findall(r"`(\w+)`", table) == list(zoo.network_names())


# Million parameters at 100 classes, as the tables of RepDistiller's and mdistiller's successors print them.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wrn_16_1", 0.18),
        ("wrn_16_2", 0.70),
        ("wrn_40_1", 0.57),
        ("wrn_40_2", 2.26),
        ("vgg8", 3.97),
        ("vgg13", 9.46),
        ("mobilenetv2", 0.81),
        ("shufflenetv1", 0.95),
        ("shufflenetv2", 1.36),
        ("shufflenetv2_1_5", 2.58),
        ("resnet50", 23.71),
    ],
)
def test_published_parameters(name: str, millions: float) -> None:
    assert sum(layer.parameters for layer in LAYERS[name]) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", LAYERS)
def test_keys_are_those_of_the_public_checkpoints(name: str) -> None:
    expected = [f"{layer.name}.{key}" for layer in LAYERS[name] for key in layer.keys]
    assert sorted(zoo.create(name, K).state_dict()) == sorted(expected)


def test_some_keys_in_full() -> None:
    """The sums above make their keys by rule; these are copied out."""
    for name, keys in {
        "wrn_40_2": ["block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.running_var", "bn1.bias", "fc.weight"],
        "vgg13": ["block0.0.bias", "block0.3.weight", "block4.4.running_mean", "classifier.bias"],
        "mobilenetv2": ["conv1.0.weight", "blocks.5.2.conv.7.bias", "conv2.1.weight", "classifier.0.weight"],
        "shufflenetv1": ["layer1.0.conv1.weight", "layer2.7.bn3.weight", "linear.weight"],
        "shufflenetv2": ["layer3.0.bn5.bias", "layer2.7.conv3.weight", "conv2.weight", "linear.bias"],
        "resnet50": ["layer1.0.shortcut.0.weight", "layer3.5.conv3.weight", "layer4.2.bn3.bias", "linear.weight"],
    }.items():
        assert set(keys) <= set(zoo.create(name, 10).state_dict()), name


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown network 'resnet200'\. Did you mean 'resnet20'\?"):
        zoo.create("resnet200", 10)


@pytest.mark.parametrize("name", ["wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_a_checkpoint_as_those_authors_save_it_loads(name: str, tmp_path: Path) -> None:
    theirs = zoo.create(name, 10)
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": theirs.state_dict(), "best_acc": torch.tensor(70.0)}, path)
    state = load_checkpoint(path).state
    ours = zoo.create(name, 10)
    load_weights(ours, state, str(path), name)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(CheckpointError, match=r"was trained on 10 classes; the data have 100"):
        load_weights(zoo.create(name, 100), state, str(path), name)

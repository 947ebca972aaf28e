"""ShuffleNetV1 and V2 (arXiv 1707.01083, 1807.11164) for small images.

A 1x1 stem of 24 channels that keeps the size, three stages that each halve it, global average pooling, one linear
layer; V2 closes with a 1x1 convolution. V1 works in three groups; V2 splits its channels in two halves and passes one
on as it is. Module names are those of the checkpoints of RepDistiller and mdistiller (conv1, bn1, layer1..3, conv2,
bn2, linear).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from rkd_deploy.models.staged import Staged, checked_widths

_GROUPS = 3


def shuffled(map_NCHW: Tensor, groups: int) -> Tensor:
    """Shuffle channels: seen as a matrix [groups, C / groups] and transposed, so that groups exchange channels."""
    return torch.unflatten(map_NCHW, 1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """Unit of V1: grouped 1x1 to a quarter of the channels, shuffle, depthwise 3x3, grouped 1x1.

    The input is added to the result or, at stride 2, appended to it.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output; with stride 2 the pooled input is the last `in_channels` of them.
        stride: 1 or 2.
        groups: Groups of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        new = channels - in_channels if stride == 2 else channels
        narrow = new // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, new, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, channels, H / stride, W / stride]."""
        out = shuffled(relu(self.bn1(self.conv1(x_NCHW))), self.groups)
        # The paper has no ReLU after the depthwise convolution; the networks of the checkpoints have one.
        out = self.bn3(self.conv3(relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return relu(out + x_NCHW)
        return relu(torch.cat([out, avg_pool2d(x_NCHW, 3, 2, padding=1)], dim=1))


class ShuffleNetV1(Staged):
    """ShuffleNetV1 with three groups, for small images.

    Args:
        widths: Channels of the stem, and those that each stage adds: a stage begins by appending new channels to its
            pooled input, so stage i has widths[0] + ... + widths[i]. The sum of any widths is thus a network.
        num_classes: K, or None for a feature extractor without a head.
    """

    # A quarter of the channels, old or new, is divided into the groups.
    multiple_of = 4 * _GROUPS

    def __init__(self, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        meaning = "the stem's and those that each of three stages adds"
        self.widths = checked_widths(widths, 4, meaning, self.multiple_of)
        stem, c1, c2, c3 = (sum(self.widths[: i + 1]) for i in range(4))
        self.conv1 = nn.Conv2d(3, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        # The stem has too few channels to divide its first convolution into groups (section 3.2 of the paper).
        self.layer1 = self._stage(stem, c1, blocks=4, groups=1)
        self.layer2 = self._stage(c1, c2, blocks=8, groups=_GROUPS)
        self.layer3 = self._stage(c2, c3, blocks=4, groups=_GROUPS)
        self.linear = None if num_classes is None else nn.Linear(c3, num_classes)

    @property
    def fc(self) -> nn.Linear | None:
        """The linear classifier on the pooled last map; None without a head."""
        return self.linear

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return sum(self.widths)

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stage maps, at 1/2, 1/4 and 1/8 of the input's size."""
        f1 = self.layer1(relu(self.bn1(self.conv1(x_NCHW))))
        f2 = self.layer2(f1)
        return f1, f2, self.layer3(f2)

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem with the first stage, then stage by stage."""
        return nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.layer1), self.layer2, self.layer3

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> ShuffleNetV1:
        """A network of the same blocks at other widths, with fresh weights."""
        return ShuffleNetV1(widths, num_classes)

    def _stage(self, in_channels: int, channels: int, blocks: int, groups: int) -> nn.Sequential:
        first = GroupedUnit(in_channels, channels, 2, groups)
        return nn.Sequential(first, *(GroupedUnit(channels, channels, 1, _GROUPS) for _ in range(blocks - 1)))


class SplitUnit(nn.Module):
    """Unit of V2 at stride 1: half of the channels as it is, half through 1x1, depthwise 3x3, 1x1; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, channels, H, W] to maps of equal shape."""
        unchanged, changed = x_NCHW.chunk(2, dim=1)
        changed = relu(self.bn1(self.conv1(changed)))
        changed = relu(self.bn3(self.conv3(self.bn2(self.conv2(changed)))))
        return shuffled(torch.cat([unchanged, changed], dim=1), 2)


class HalvingUnit(nn.Module):
    """Unit of V2 at stride 2: two branches, each half of the output, then a shuffle."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, channels, H / 2, W / 2]."""
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x_NCHW)))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x_NCHW)))))
        right = relu(self.bn5(self.conv5(right)))
        return shuffled(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(Staged):
    """ShuffleNetV2 for small images.

    Args:
        widths: Channels of the stem, the three stages and the closing convolution.
        num_classes: K, or None for a feature extractor without a head.
    """

    multiple_of = 2  # halves

    def __init__(self, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        meaning = "the stem's, three stages' and the closing convolution's"
        self.widths = checked_widths(widths, 5, meaning, self.multiple_of)
        stem, c1, c2, c3, last = self.widths
        self.conv1 = nn.Conv2d(3, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, c1, blocks=4)
        self.layer2 = self._stage(c1, c2, blocks=8)
        self.layer3 = self._stage(c2, c3, blocks=4)
        self.conv2 = nn.Conv2d(c3, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = None if num_classes is None else nn.Linear(last, num_classes)

    @property
    def fc(self) -> nn.Linear | None:
        """The linear classifier on the pooled last map; None without a head."""
        return self.linear

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stage maps, at 1/2, 1/4 and 1/8 of the input's size; the last after the closing convolution."""
        f1 = self.layer1(relu(self.bn1(self.conv1(x_NCHW))))
        f2 = self.layer2(f1)
        return f1, f2, relu(self.bn2(self.conv2(self.layer3(f2))))

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem with the first stage, the second, the third with the closing convolution."""
        return (
            nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.layer1),
            self.layer2,
            nn.Sequential(self.layer3, self.conv2, self.bn2, nn.ReLU()),
        )

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> ShuffleNetV2:
        """A network of the same blocks at other widths, with fresh weights."""
        return ShuffleNetV2(widths, num_classes)

    def _stage(self, in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(HalvingUnit(in_channels, channels), *(SplitUnit(channels) for _ in range(blocks - 1)))


FAMILY: dict[str, Callable[[int], Staged]] = {
    "shufflenetv1": partial(ShuffleNetV1, (24, 216, 240, 480)),
    "shufflenetv2": partial(ShuffleNetV2, (24, 116, 232, 464, 1024)),
    "shufflenetv2_1_5": partial(ShuffleNetV2, (24, 176, 352, 704, 1024)),
}

"""ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1) for small images.

Four stages of 3, 4, 6 and 3 bottleneck blocks with stride 2 (on the 3x3 convolution) at the start of the last three,
global average pooling, one linear layer. Module names are those of the checkpoints of RepDistiller and mdistiller
(conv1, bn1, layer1..4, shortcut, linear).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from rkd_deploy.models.staged import Staged, checked_widths, he_initialised

_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


class Bottleneck(nn.Module):
    """Bottleneck block: relu(1x1, 3x3, 1x1 to four times the width, plus the shortcut), each with batch norm."""

    def __init__(self, in_channels: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        channels = _EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Sequential | None = None
        if projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, 4 width, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x_NCHW if self.shortcut is None else self.shortcut(x_NCHW)
        return cast(Tensor, self.relu(out))


class ResNet50(Staged):
    """ResNet-50 for small images.

    Args:
        widths: Channels of the stem and of the bottlenecks of the four stages; a stage puts out four times as many.
        num_classes: K, or None for a feature extractor without a head.
    """

    def __init__(self, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.widths = checked_widths(widths, 5, "the stem's and those of four stages' bottlenecks")
        stem, *stages = self.widths
        before = (stem, *(_EXPANSION * width for width in stages[:-1]))
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(_stage, _BLOCKS, before, stages, (1, 2, 2, 2))
        self.linear = None if num_classes is None else nn.Linear(self.channels, num_classes)
        he_initialised(self)

    @property
    def fc(self) -> nn.Linear | None:
        """The linear classifier on the pooled last map; None without a head."""
        return self.linear

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return _EXPANSION * self.widths[-1]

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four stage maps, at 1, 1/2, 1/4 and 1/8 of the input's size."""
        f1 = self.layer1(self.relu(self.bn1(self.conv1(x_NCHW))))
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        return f1, f2, f3, self.layer4(f3)

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem with the first stage, then stage by stage."""
        return nn.Sequential(self.conv1, self.bn1, self.relu, self.layer1), self.layer2, self.layer3, self.layer4

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> ResNet50:
        """A network of the same blocks at other widths, with fresh weights."""
        return ResNet50(widths, num_classes)


def _stage(blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
    # The first block projects always. If it did only where the channels change, a wider stem could be the cheaper one.
    first = Bottleneck(in_channels, width, stride, projection=True)
    return nn.Sequential(first, *(Bottleneck(_EXPANSION * width, width, 1, False) for _ in range(blocks - 1)))


FAMILY = {"resnet50": partial(ResNet50, (64, 64, 128, 256, 512))}

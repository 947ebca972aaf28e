"""The CIFAR ResNet family of He et al. 2016 (arXiv 1512.03385, section 4.2), depth 6n + 2.

A 3x3 stem, three stages of n basic blocks with stride 2 at the start of the second and third, global average pooling,
one linear layer. Shortcuts are 1x1 projections wherever the shape changes. Module names are those of the public
checkpoints (conv1, bn1, layer1..3, downsample, fc), so that their state dicts load as they are. The `x4` variants are
four times as wide and keep a stem of 32 channels, as in RepDistiller and mdistiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.staged import Staged, checked_widths, he_initialised


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, channels, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        out += x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return cast(Tensor, self.relu(out))


class CifarResNet(Staged):
    """A 6n + 2 ResNet for small images.

    Args:
        depth: 6n + 2 layers.
        widths: Channels of the stem and the three stages.
        num_classes: K, or None for a feature extractor without a head.
    """

    fc: nn.Linear | None

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"depth = {depth} is not 6n + 2 with n >= 1 (8, 14, 20, 26, 32, ...).")
        self.depth = depth
        self.widths = checked_widths(widths, 4, "the stem's and three stages'")
        stem, *stages = self.widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(stem, stages[0], stride=1)
        self.layer2 = self._stage(stages[0], stages[1], stride=2)
        self.layer3 = self._stage(stages[1], stages[2], stride=2)
        self.fc = None if num_classes is None else nn.Linear(self.channels, num_classes)
        he_initialised(self)

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stage maps, at 1, 1/2 and 1/4 of the input's size."""
        f1 = self.layer1(self.relu(self.bn1(self.conv1(x_NCHW))))
        f2 = self.layer2(f1)
        return f1, f2, self.layer3(f2)

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem with the first stage, then stage by stage."""
        return nn.Sequential(self.conv1, self.bn1, self.relu, self.layer1), self.layer2, self.layer3

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> CifarResNet:
        """A network of the same depth at other widths, with fresh weights."""
        return CifarResNet(self.depth, widths, num_classes)

    def _stage(self, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        blocks = (self.depth - 2) // 6
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride), *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
        )


FAMILY = {
    **{f"resnet{depth}": partial(CifarResNet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, (32, 64, 128, 256)) for depth in (8, 14, 20, 32)},
}

"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) of half width, for small images.

A 3x3 stem with stride 2, seven groups of inverted residual blocks (1x1 expansion, 3x3 depthwise, linear 1x1), a closing
1x1 convolution, global average pooling, one linear layer. Against the paper, for 32x32: the second group keeps its
size, so the last map is 2x2; and the first group expands by 1 with a convolution of its own. Module names are those of
the checkpoints of RepDistiller and mdistiller (conv1, blocks, conv2, classifier).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from rkd_deploy.models.staged import Staged, checked_widths, he_initialised

_GROUPS = ((1, 1, 1), (6, 2, 1), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
"""Expansion, number of blocks and stride of each group of blocks."""


class InvertedResidual(nn.Module):
    """Inverted residual: expand, convolve each channel alone, project without ReLU; plus the input if `identity`."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, identity: bool) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            *_convolution(in_channels, hidden, 1),
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            *_convolution(hidden, channels, 1)[:-1],
        )
        self.identity = identity

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, channels, H / stride, W / stride]."""
        out = self.conv(x_NCHW)
        return cast(Tensor, x_NCHW + out if self.identity else out)


class MobileNetV2(Staged):
    """MobileNetV2 for small images.

    Args:
        widths: Channels of the stem, of what each of the seven groups puts out, and of the closing convolution.
        num_classes: K, or None for a feature extractor without a head.
    """

    def __init__(self, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.widths = checked_widths(widths, 9, "the stem's, seven groups' and the closing convolution's")
        stem, *groups, last = self.widths
        self.conv1 = nn.Sequential(*_convolution(3, stem, 3, stride=2))
        self.blocks = nn.ModuleList(map(_group, _GROUPS, (stem, *groups), groups))
        self.conv2 = nn.Sequential(*_convolution(groups[-1], last, 1))
        self.classifier = None if num_classes is None else nn.Sequential(nn.Linear(last, num_classes))
        he_initialised(self)
        if self.fc is not None:
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @property
    def fc(self) -> nn.Linear | None:
        """The linear classifier on the pooled last map; None without a head."""
        return None if self.classifier is None else cast(nn.Linear, self.classifier[0])

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last map of each size: at 1/2, 1/4, 1/8 and 1/16 of the input's.

        The first three are outputs of linear bottlenecks, as the distillation literature takes them; the last is that
        of the closing convolution, with its ReLU.
        """
        maps = [self.conv1(x_NCHW)]
        for group in self.blocks:
            maps.append(group(maps[-1]))
        _, _, f1, f2, _, f3, _, f4 = maps
        return f1, f2, f3, self.conv2(f4)

    def stages(self) -> tuple[nn.Module, ...]:
        """The groups up to each map; the stem in the first, the closing convolution in the last."""
        first, second, third, fourth = self.blocks[:2], self.blocks[2:3], self.blocks[3:5], self.blocks[5:]
        return (
            nn.Sequential(self.conv1, *first),
            nn.Sequential(*second),
            nn.Sequential(*third),
            nn.Sequential(*fourth, self.conv2),
        )

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> MobileNetV2:
        """A network of the same groups at other widths, with fresh weights."""
        return MobileNetV2(widths, num_classes)


def _convolution(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _group(setting: tuple[int, int, int], in_channels: int, channels: int) -> nn.Sequential:
    expansion, blocks, stride = setting
    # The first block of a group changes the channels. That it has no identity must not depend on the widths: two that
    # happen to be equal after narrowing would change the network.
    first = InvertedResidual(in_channels, channels, stride, expansion, identity=False)
    more = (InvertedResidual(channels, channels, 1, expansion, identity=True) for _ in range(blocks - 1))
    return nn.Sequential(first, *more)


FAMILY = {"mobilenetv2": partial(MobileNetV2, (16, 8, 12, 16, 32, 48, 80, 160, 1280))}

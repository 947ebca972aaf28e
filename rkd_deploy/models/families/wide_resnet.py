"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146): wrn_DEPTH_K, depth 6n + 4.

K is the factor of width.

A 3x3 stem, three stages of n pre-activation blocks with stride 2 at the start of the second and third, batch norm,
ReLU, global average pooling, one linear layer. A block normalises and activates before each convolution, so the batch
norm at its start follows an addition: at export that one cannot be folded into a convolution and stays. Module names
are those of the checkpoints of RepDistiller and mdistiller (conv1, block1..3.layer, convShortcut, bn1, fc). No dropout,
as there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.staged import Staged, checked_widths, he_initialised


class PreActivationBlock(nn.Module):
    """Pre-activation block: conv2(relu(bn2(conv1(a)))) + shortcut with a = relu(bn1(x)).

    The shortcut is x, or a 1x1 projection of a where channels or resolution change.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to maps [N, channels, H / stride, W / stride]."""
        activated = self.relu(self.bn1(x_NCHW))
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return cast(Tensor, out + (x_NCHW if self.convShortcut is None else self.convShortcut(activated)))


class WideResNet(Staged):
    """A 6n + 4 Wide ResNet for small images.

    Args:
        depth: 6n + 4 layers, as the paper counts them.
        widths: Channels of the stem and the three stages.
        num_classes: K, or None for a feature extractor without a head.
    """

    fc: nn.Linear | None

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UsageError(f"depth = {depth} is not 6n + 4 with n >= 1 (10, 16, 22, 28, 34, 40, ...).")
        self.depth = depth
        self.widths = checked_widths(widths, 4, "the stem's and three stages'")
        stem, *stages = self.widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = self._stage(stem, stages[0], stride=1)
        self.block2 = self._stage(stages[0], stages[1], stride=2)
        self.block3 = self._stage(stages[1], stages[2], stride=2)
        self.bn1 = nn.BatchNorm2d(self.channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = None if num_classes is None else nn.Linear(self.channels, num_classes)
        he_initialised(self)
        if self.fc is not None:
            nn.init.zeros_(self.fc.bias)

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stage maps, at 1, 1/2 and 1/4 of the input's size.

        The first two are the sums that leave a stage, as the distillation literature takes them: their activation is
        the next block's. The last is normalised and activated, as the head sees it.
        """
        f1 = self.block1(self.conv1(x_NCHW))
        f2 = self.block2(f1)
        return f1, f2, self.relu(self.bn1(self.block3(f2)))

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem with the first stage, then stage by stage."""
        return nn.Sequential(self.conv1, self.block1), self.block2, nn.Sequential(self.block3, self.bn1, self.relu)

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> WideResNet:
        """A network of the same depth at other widths, with fresh weights."""
        return WideResNet(self.depth, widths, num_classes)

    def _stage(self, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        more = (self.depth - 4) // 6 - 1
        first = PreActivationBlock(in_channels, channels, stride)
        layer = nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(more)))
        return nn.Sequential(OrderedDict(layer=layer))


FAMILY = {
    f"wrn_{depth}_{k}": partial(WideResNet, depth, (16, 16 * k, 32 * k, 64 * k)) for depth in (16, 40) for k in (1, 2)
}

"""VGG with batch norm (Simonyan and Zisserman 2014, arXiv 1409.1556) for small images.

Five blocks of 3x3 convolutions, each with bias, batch norm and ReLU; a 2x2 max pooling after each of the first three;
global average pooling and one linear layer at the end. vgg8 has one convolution a block, vgg11 to vgg19 are the
paper's A, B, D and E.
Module names are those of the checkpoints of RepDistiller and mdistiller (block0..4, classifier). Those networks pool
after the fourth block too where images are 64x64; here they are the ones for 32x32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from rkd_deploy.models.staged import Staged, checked_widths, he_initialised


class VGG(Staged):
    """A VGG network for 32x32 images.

    Args:
        depths: Convolutions in each of the five blocks.
        widths: Channels of the blocks; the first block is the stem.
        num_classes: K, or None for a feature extractor without a head.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.widths = checked_widths(widths, 5, "those of the five blocks")
        before = (3, *self.widths[:-1])
        self.block0, self.block1, self.block2, self.block3, self.block4 = map(_block, self.depths, before, self.widths)
        self.relu = nn.ReLU()
        self.halve = nn.MaxPool2d(2)
        self.classifier = None if num_classes is None else nn.Linear(self.channels, num_classes)
        he_initialised(self)
        if self.classifier is not None:
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    @property
    def fc(self) -> nn.Linear | None:
        """The linear classifier on the pooled last map; None without a head."""
        return self.classifier

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps of the last four blocks, before pooling: at 1/2, 1/4, 1/8 and 1/8 of the input's size."""
        f0 = self.relu(self.block0(x_NCHW))
        f1 = self.relu(self.block1(self.halve(f0)))
        f2 = self.relu(self.block2(self.halve(f1)))
        f3 = self.relu(self.block3(self.halve(f2)))
        return f1, f2, f3, self.relu(self.block4(f3))

    def stages(self) -> tuple[nn.Module, ...]:
        """The first two blocks, then block by block; a pooling belongs to the block after it."""
        return (
            nn.Sequential(self.block0, self.relu, self.halve, self.block1, self.relu),
            nn.Sequential(self.halve, self.block2, self.relu),
            nn.Sequential(self.halve, self.block3, self.relu),
            nn.Sequential(self.block4, self.relu),
        )

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> VGG:
        """A network of the same depth at other widths, with fresh weights."""
        return VGG(self.depths, widths, num_classes)


def _block(depth: int, in_channels: int, channels: int) -> nn.Sequential:
    """Convolutions with batch norm and ReLU; the last ReLU is left to the network, as in the public checkpoints."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


_DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
FAMILY = {name: partial(VGG, depths, (64, 128, 256, 512, 512)) for name, depths in _DEPTHS.items()}

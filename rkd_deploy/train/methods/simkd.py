"""SimKD, the reused teacher classifier (Chen et al., CVPR 2022, arXiv 2203.14001).

    L = MSE(f_T, R f_S)      R: 1x1 to C_T / f, 3x3, 1x1 to C_T, each with batch norm and ReLU
    z = h_T(GAP(R f_S))      h_T the teacher's head, frozen

Published protocol (the authors' code): L alone, no cross-entropy, f = 2. R is not linear, so it cannot be folded away:
a network trained by SimKD alone ships R and costs more than S0. As a base loss for S only L is used, R is dropped after
training, and for the control S0 cross-entropy trains its own head. Maps of unequal size: the larger one is
average-pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train.methods.base import BaseLoss, View, match_size


def projector(channels: int, out_channels: int, factor: int) -> nn.Sequential:
    """The projector R from S's channels to T's; `factor` is f."""
    middle = max(1, out_channels // factor)
    layers: list[nn.Module] = []
    for before, after, size in ((channels, middle, 1), (middle, middle, 3), (middle, out_channels, 1)):
        layers += [nn.Conv2d(before, after, size, padding=size // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


class ReusedClassifier(FeatureNetwork):
    """S0's stages, R, and the teacher's head: what SimKD ships.

    Args:
        backbone: S0 without a head.
        channels: C_T.
        head: h_T, or one like it.
        factor: f.
    """

    fc: nn.Module

    def __init__(self, backbone: FeatureNetwork, channels: int, head: nn.Module, factor: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector(backbone.channels, channels, factor)
        self.fc = head
        self._channels = channels

    @property
    def channels(self) -> int:
        """Channels C_T of the last map, which the head takes."""
        return self._channels

    def without_head(self) -> FeatureNetwork:
        """S0 alone: R belongs to the head, and goes with it."""
        return self.backbone.without_head()

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Stage maps of S0, the last one as R f_S, [N, C_T, H', W']."""
        # The last map is R's, so that everything else (pooling, losses, export) sees a network that simply ends in C_T
        # channels.
        *maps, f_S = self.backbone.features(x_NCHW)
        return (*maps, self.projector(f_S))


class SimKD(BaseLoss):
    """SimKD's L on the last maps.

    Args:
        teacher: (C, H, W) of T's stage maps.
        student: (C, H, W) of the student's stage maps.
        factor: f. None: the student has an R of its own, as `ReusedClassifier` does.
    """

    weight, ce_weight = 1.0, 0.0

    def __init__(
        self,
        teacher: Sequence[tuple[int, int, int]],
        student: Sequence[tuple[int, int, int]],
        factor: int | None,
    ) -> None:
        super().__init__()
        self.projector = nn.Identity() if factor is None else projector(student[-1][0], teacher[-1][0], factor)

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L = MSE(f_T, R f_S) of a batch."""
        f_T, f_S = match_size(teacher.maps[-1], student.maps[-1])
        return mse_loss(self.projector(f_S), f_T)

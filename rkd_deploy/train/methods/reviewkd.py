"""Knowledge review, ReviewKD (Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044).

From the deepest level to the shallowest, S's maps f_i are fused with what comes from the level below and each result
imitates T's map of the same level; the pooled last map, taken as a 1x1 map, is a level of its own, the deepest:

    x_i = a_i * BN(1x1 f_i) + c_i * up(x_{i+1})        (a_i, c_i) = sigmoid(1x1 [BN(1x1 f_i); up(x_{i+1})])
    u_i = BN(3x3 x_i)                                  to T's channels, at T's size
    L   = sum_i HCL(u_i, f_T,i)

HCL is a mean of squared errors at several sizes: with weight 1 at full size and 1/2, 1/4, 1/8 at those of 4x4, 2x2 and
1x1 that are smaller, divided by the sum of the weights used. Published protocol (mdistiller): CE + L (5 L from
ResNet-32x4 to ResNet-8x4), L rising linearly over 20 epochs. There the maps of T are taken before the last ReLU of
their stage; the stage maps here are those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, mse_loss

from rkd_deploy.models.staged import pool
from rkd_deploy.train.methods.base import BaseLoss, View


def hierarchical_context_loss(u_NCHW: Tensor, f_NCHW: Tensor) -> Tensor:
    """Hierarchical context loss HCL of two maps of the same shape."""
    total, weights, weight = mse_loss(u_NCHW, f_NCHW), 1.0, 1.0
    for size in (4, 2, 1):
        # By the height alone, as in the authors' code: at this size and below, pooling would be the map itself or
        # enlarge it.
        if size >= f_NCHW.shape[-2]:
            continue
        weight /= 2
        total = total + weight * mse_loss(adaptive_avg_pool2d(u_NCHW, size), adaptive_avg_pool2d(f_NCHW, size))
        weights += weight
    return total / weights


class Fusion(nn.Module):
    """Fuses S's map of one level with what comes from the level below, by attention.

    Args:
        channels: Channels of S's map.
        width: Channels of x, the same at every level.
        out_channels: Channels of T's map.
        deepest: Whether this is the deepest level, to which nothing comes from below.
    """

    def __init__(self, channels: int, width: int, out_channels: int, deepest: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.out = nn.Sequential(nn.Conv2d(width, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels))
        for convolution in (
            self.narrow[0],
            self.out[0],
        ):  # a = 1 as in the authors' code; PyTorch's default is narrower
            nn.init.kaiming_uniform_(cast(Tensor, convolution.weight), a=1)

    def forward(self, f_NCHW: Tensor, below_NCHW: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns u at T's size, and x for the level above."""
        x = self.narrow(f_NCHW)
        if self.attention is not None:
            assert below_NCHW is not None
            up = interpolate(below_NCHW, x.shape[-2:], mode="nearest")
            a, c = self.attention(torch.cat([x, up], dim=1)).split(1, dim=1)
            x = a * x + c * up
        if x.shape[-2:] != size:
            x = interpolate(x, size, mode="nearest")
        return self.out(x), x


class ReviewKD(BaseLoss):
    """ReviewKD's L on all stage maps and the pooled last map, with its fusions.

    Args:
        teacher: (C, H, W) of T's stage maps.
        student: (C, H, W) of S's stage maps; paired with T's from the deepest.
    """

    weight, warmup_epochs = 1.0, 20

    def __init__(self, teacher: Sequence[tuple[int, int, int]], student: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.levels = min(len(teacher), len(student))
        into = [shape[0] for shape in student[-self.levels :]] + [student[-1][0]]
        out = [shape[0] for shape in teacher[-self.levels :]] + [teacher[-1][0]]
        width = min(512, student[-1][0])  # the authors' rule
        self.fusions = nn.ModuleList(
            Fusion(channels, width, out_channels, deepest=level == self.levels)
            for level, (channels, out_channels) in enumerate(zip(into, out, strict=True))
        )

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L of a batch, the sum over levels, deepest first."""
        maps_T, maps_S = (
            [*view.maps[-self.levels :], pool(view.maps[-1])[:, :, None, None]] for view in (teacher, student)
        )
        losses: list[Tensor] = []
        x: Tensor | None = None
        for fusion, f_S, f_T in reversed(list(zip(self.fusions, maps_S, maps_T, strict=True))):
            u, x = fusion(f_S, x, tuple(f_T.shape[-2:]))
            losses.append(hierarchical_context_loss(u, f_T))
        return sum(losses[1:], losses[0])

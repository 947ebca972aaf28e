"""Attention transfer, AT (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928).

    Q(f) = vec(mean over channels of f^2), divided by its L2 norm      [N, H W]
    L    = sum over stages of the mean squared difference of Q(f_T) and Q(f_S)

The mean over channels is the paper's sum up to a factor that the norm takes out. The paper writes the norm of the
difference where its authors' code, and every table since, has the mean square: that is the loss here. Published
protocol (RepDistiller, mdistiller): CE + 1000 L. Maps of unequal size: the larger one is average-pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from rkd_deploy.train.methods.base import BaseLoss, View, match_size, pair_stages, promoted


def attention(f_NCHW: Tensor) -> Tensor:
    """Attention map Q(f) of stage maps, [N, H W] of norm 1."""
    # Squares before the mean: in float16 they would overflow, in bfloat16 their differences vanish; hence promoted.
    return normalize(promoted(f_NCHW).square().mean(1).flatten(1))


def attention_loss(maps_T: Sequence[Tensor], maps_S: Sequence[Tensor]) -> Tensor:
    """Attention transfer's L of two networks' stage maps, paired from the deepest."""
    pairs = [match_size(f_T, f_S) for f_T, f_S in pair_stages(maps_T, maps_S)]
    losses = [mse_loss(attention(f_S), attention(f_T)) for f_T, f_S in pairs]
    return sum(losses[1:], losses[0])


class AttentionTransfer(BaseLoss):
    """Attention transfer's L on all stage maps."""

    weight, by_stage = 1000.0, True

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L, the sum over stages; labels and logits are not read."""
        return attention_loss(teacher.maps, student.maps)

"""DKD, decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

With p = softmax(z / tau), y the label, b = (p_y, 1 - p_y) and q = p without class y, renormalised:

    KL(p_T || p_S) = KL(b_T || b_S) + (1 - p_T,y) KL(q_T || q_S)  =  TCKD + (1 - p_T,y) NCKD
    L              = tau^2 (alpha TCKD + beta NCKD), mean over the batch

Published protocol (mdistiller): CE + L, alpha = 1, beta = 8 (2 for ResNet-56 to ResNet-20), tau = 4, L rising linearly
over 20 epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, one_hot

from rkd_deploy.data.augment import hard_labels
from rkd_deploy.train.methods.base import BaseLoss, View
from rkd_deploy.train.methods.kd import standardised_logits


def dkd_loss(z_T: Tensor, z_S: Tensor, y_N: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """DKD's L of logits [N, K] and labels [N] (of smoothed targets [N, K] the class); finite for any finite logits."""
    is_y = one_hot(hard_labels(y_N), z_T.shape[1]).bool()
    (log_b_T, log_q_T), (log_b_S, log_q_S) = (_log_parts(z / temperature, is_y) for z in (z_T, z_S))
    tckd = kl_div(log_b_S, log_b_T, reduction="batchmean", log_target=True)
    nckd = kl_div(log_q_S, log_q_T, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd)


def _log_parts(z_NK: Tensor, is_y: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of b [N, 2], label against the rest, and of q [N, K], the rest alone."""
    all_N1 = z_NK.logsumexp(1, keepdim=True)
    # By logsumexp of the others and not as log(1 - p_y): where T is sure, 1 - p_y is 0 in float32 and its logarithm
    # infinite.
    others_N1 = z_NK.masked_fill(is_y, -torch.inf).logsumexp(1, keepdim=True)
    z_y = z_NK.masked_fill(~is_y, 0).sum(1, keepdim=True)
    log_b = torch.cat([z_y, others_N1], dim=1) - all_N1
    # At y, where q is nothing, 0 stands for log q in T and S alike: it adds 1 (0 - 0) = 0 to KL and to its gradient.
    return log_b, (z_NK - others_N1).masked_fill(is_y, 0)


class DKD(BaseLoss):
    """DKD's L on the logits.

    Args:
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: tau.
        standardise: Standardise both logits first (`rkd_deploy.train.methods.kd`).
    """

    weight, warmup_epochs = 1.0, 20

    def __init__(self, alpha: float, beta: float, temperature: float, standardise: bool) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature, self.standardise = alpha, beta, temperature, standardise

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L = tau^2 (alpha TCKD + beta NCKD) of a batch."""
        z_T, z_S = teacher.logits_NK, student.logits_NK
        if self.standardise:
            z_T, z_S = standardised_logits(z_T), standardised_logits(z_S)
        return dkd_loss(z_T, z_S, y_N, self.alpha, self.beta, self.temperature)

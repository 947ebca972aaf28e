"""KD: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), standardised or not.

    p = softmax(z / tau)
    L = tau^2 KL(p_T || p_S), mean over the batch

Published protocol (RepDistiller, mdistiller): 0.1 CE + 0.9 L, tau = 4.

Standardised (Sun et al., CVPR 2024, arXiv 2403.01427): each z is replaced by (z - mean z) / (std z + 1e-7) over its K
classes before, std with K - 1, so that S has to match T's ranking and not its range; its authors run it with tau = 2
and weight 9.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from rkd_deploy.train.methods.base import BaseLoss, View


def kd_loss(z_T: Tensor, z_S: Tensor, temperature: float) -> Tensor:
    """KD's L = tau^2 KL(p_T || p_S) of logits [N, K]; finite for finite logits, because nothing leaves log space."""
    log_p_T, log_p_S = (log_softmax(z / temperature, dim=1) for z in (z_T, z_S))
    # Gradients of softened targets shrink as 1 / tau^2 (section 2 of the paper): the factor keeps the balance with
    # cross-entropy at any tau.
    return temperature**2 * kl_div(log_p_S, log_p_T, reduction="batchmean", log_target=True)


def standardised_logits(z_NK: Tensor) -> Tensor:
    """Logits [N, K] shifted and scaled to mean 0 and standard deviation 1 in each row."""
    return (z_NK - z_NK.mean(1, keepdim=True)) / (z_NK.std(1, keepdim=True) + 1e-7)


class KD(BaseLoss):
    """KD's L on the logits.

    Args:
        temperature: tau.
        standardise: Standardise both logits first.
    """

    weight, ce_weight = 0.9, 0.1

    def __init__(self, temperature: float, standardise: bool) -> None:
        super().__init__()
        self.temperature, self.standardise = temperature, standardise

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L = tau^2 KL(p_T || p_S) of a batch."""
        z_T, z_S = teacher.logits_NK, student.logits_NK
        if self.standardise:
            z_T, z_S = standardised_logits(z_T), standardised_logits(z_S)
        return kd_loss(z_T, z_S, self.temperature)

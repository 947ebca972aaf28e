"""Residual knowledge distillation (Gao, Shen, Li, Loy, arXiv 2002.09168), the end-to-end scheme: all losses at once.

    s_0 = P_S f_S,  s_i = s_{i-1} + P_i f_i                  i = 1 .. k
    r_i = sg(f_T - s_{i-1})                                  sg: stop-gradient, a switch
    L   = L_S + (alpha w / k) sum_i d^(i-1) D(r_i, P_i f_i) + beta CE(z, y) + gamma KL_tau(z_T, z)
    L_S = w D(f_T, s_0) [+ b X(T, S, y)]
    z   = h(GAP(s_k))

With sg each D teaches one branch alone, and only CE and KL reach all of them; without, what A cannot learn pulls at S
too (a switch in the manner of ERA's gap_model_detach; Yan et al., arXiv 2508.16050). The weights d^(i-1), which are 1,
1/2, 1/4, .. for d = 1/2, and the mean over branches are ERA's as well. ERA adds CE to every partial sum, here it is on
the finished one. h is T's head, frozen, or is trained along, from T's weights or from fresh ones; X sees S's logits
under the same h. The paper's own end-to-end loss is not public: this one is the project's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork, pool
from rkd_deploy.train.methods.base import Losses, Method, View, WeightedLoss, view_teacher
from rkd_deploy.train.methods.kd import kd_loss
from rkd_deploy.train.methods.residual import Distance, explained_variance, match_sizes, staged_distance, sum_maps


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The letters of L: w, alpha, beta, gamma, tau, d, and v of the stages before the last (`residual.py`)."""

    feature: float
    assistant: float
    ce: float
    kl: float
    temperature: float
    step_decay: float
    stage: float = 1.0


class EndToEnd(Method):
    """S, its assistants and, where it is not T's, the head learn together.

    Args:
        teacher: T, frozen.
        model: S, its assistants and head.
        distance: D.
        weights: Of the terms.
        detach: Stop the gradient at r.
        train_head: Train h along; else it stays as it is.
        base: b X, or None.
    """

    def __init__(
        self,
        teacher: FeatureNetwork,
        model: ResidualStudent,
        distance: Distance,
        weights: Weights,
        *,
        detach: bool,
        train_head: bool,
        base: WeightedLoss | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.model, self.base = teacher, model.requires_grad_(True), base
        self.distance, self.weights, self.detach = distance, weights, detach
        self.freeze(teacher, *([] if train_head else [model.head]))

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """L, in the order of its terms."""
        w, model = self.weights, self.model
        teacher_view = view_teacher(self.teacher, x_NCHW)
        maps = model.student.features(x_NCHW)
        s = model.compared_maps(0, maps)
        f_T, resized_s = match_sizes(model.targets(teacher_view.maps), s)
        parts: dict[str, Tensor] = {}

        error, last = staged_distance(self.distance, w.stage, f_T, resized_s)
        total, parts["student"] = w.feature * error, last.detach()
        if self.base is not None:
            weighted, parts["base"] = self.base(teacher_view, View(maps, model.head(pool(s[-1]))), y_N)
            total = total + weighted

        k = len(model.assistants)
        for i, (assistant, _) in enumerate(model.branches()[1:], 1):
            r = [t - m for t, m in zip(f_T, resized_s, strict=True)]
            f_A = model.compared_maps(i, assistant.features(x_NCHW))
            _, resized_f_A = match_sizes(r, f_A)
            target = [residual.detach() for residual in r] if self.detach else r
            error, last = staged_distance(self.distance, w.stage, target, resized_f_A)
            total = total + w.assistant * w.feature / k * w.step_decay ** (i - 1) * error
            parts["assistant" if i == 1 else f"assistant_{i}"] = last.detach()
            s, resized_s = sum_maps(s, f_A), sum_maps(resized_s, resized_f_A)
        parts["explained"] = explained_variance(f_T[-1], resized_s[-1])

        z = model.head(pool(s[-1]))
        ce, kl = cross_entropy(z, y_N), kd_loss(teacher_view.logits_NK, z, w.temperature)
        parts |= {"ce": ce.detach(), "kl": kl.detach()}
        return Losses(total + w.ce * ce + w.kl * kl, parts, z.detach())

    def deployable(self) -> nn.Module:
        """S + A."""
        return self.model

    def auxiliary(self) -> nn.Module | None:
        """The adapters of X."""
        return self.base

    def start_epoch(self, epoch: int) -> None:
        """Set the weight of X."""
        if self.base is not None:
            self.base.start_epoch(epoch)

"""Residual knowledge distillation (Gao, Shen, Li, Loy, arXiv 2002.09168), the sequential scheme.

    S:      L_S = w D(f_T, P_S f_S)
    target: r   = stop_gradient(f_T - P_S f_S)          S frozen, batch norm in eval mode
    A:      L_A = w D(r, P_A f_A)
    h:      L_h = CE(h(GAP(P_S f_S + P_A f_A)), y)      only where the head is trained; S and A frozen

f are the last stage maps, P the 1x1 adapters to T's channels, D the mean squared error over elements, w its weight.
T is frozen throughout and in eval mode. Only the abstract of the paper and a summary of its journal version are public:
the order of the steps and the choice of D are this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, mse_loss

from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.staged import Staged, pool
from rkd_deploy.train.methods.base import Losses, Method


def distance(target_NCHW: Tensor, map_NCHW: Tensor) -> Tensor:
    """D: mean squared error over all elements."""
    return mse_loss(map_NCHW, target_NCHW)


def sized_like(target_NCHW: Tensor, map_NCHW: Tensor) -> Tensor:
    """The target, average-pooled to the height and width of the map where they differ (as SimKD does)."""
    height, width = map_NCHW.shape[-2:]
    if target_NCHW.shape[-2:] == (height, width):
        return target_NCHW
    return adaptive_avg_pool2d(target_NCHW, (height, width))


def explained(target_NCHW: Tensor, error: Tensor) -> Tensor:
    """Share of the target's mean square that is explained: 0 for a silent map, 1 for a perfect one."""
    return 1 - error.detach() / target_NCHW.square().mean()


class StudentStep(Method):
    """S learns to give T's map.

    Args:
        teacher: T, frozen.
        model: S, A and head; only S and its adapter are trained.
        weight: w, of D in the loss.
    """

    def __init__(self, teacher: Staged, model: ResidualStudent, weight: float) -> None:
        super().__init__()
        self.teacher, self.model, self.weight = teacher, model.requires_grad_(True), weight
        self.freeze(teacher, model.assistant, model.assistant_adapter, model.head)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """L_S = w D(f_T, P_S f_S)."""
        with torch.no_grad():
            f_T = self.teacher.features(x_NCHW)[-1]
        f_S = self.model.student_map(x_NCHW)
        f_T = sized_like(f_T, f_S)
        error = distance(f_T, f_S)
        parts = {"student": error.detach(), "explained": explained(f_T, error)}
        with torch.no_grad():
            logits_NK = self.model.head(pool(f_S))
        return Losses(self.weight * error, parts, logits_NK)

    def deployable(self) -> nn.Module:
        """S alone."""
        return StudentAlone(self.model)


class AssistantStep(Method):
    """A learns what S leaves over.

    Args:
        teacher: T, frozen.
        model: S, A and head; only A and its adapter are trained.
        weight: w, of D in the loss.
    """

    def __init__(self, teacher: Staged, model: ResidualStudent, weight: float) -> None:
        super().__init__()
        self.teacher, self.model, self.weight = teacher, model.requires_grad_(True), weight
        self.freeze(teacher, model.student, model.student_adapter, model.head)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """L_A = w D(r, P_A f_A) with r = f_T - P_S f_S."""
        with torch.no_grad():
            f_S = self.model.student_map(x_NCHW)
            f_T = sized_like(self.teacher.features(x_NCHW)[-1], f_S)
            r = f_T - f_S
        f_A = self.model.assistant_map(x_NCHW)
        error = distance(r, f_A)
        parts = {"assistant": error.detach(), "explained": explained(f_T, error)}
        with torch.no_grad():
            logits_NK = self.model.head(pool(f_S + f_A))
        return Losses(self.weight * error, parts, logits_NK)

    def deployable(self) -> nn.Module:
        """S + A."""
        return self.model


class HeadStep(Method):
    """A fresh head learns to classify the finished sum.

    Args:
        model: S, A and head; only the head is trained.
    """

    def __init__(self, model: ResidualStudent) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self.freeze(model.student, model.assistant, model.student_adapter, model.assistant_adapter)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """L_h = CE(h(GAP(f_S + f_A)), y)."""
        with torch.no_grad():
            pooled_NC = pool(self.model.summed_map(x_NCHW))
        logits_NK = self.model.head(pooled_NC)
        loss = cross_entropy(logits_NK, y_N)
        return Losses(loss, {"ce": loss.detach()}, logits_NK.detach())

    def deployable(self) -> nn.Module:
        """S + A under the new head."""
        return self.model

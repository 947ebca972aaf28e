"""Residual distillation (Gao et al., arXiv 2002.09168) end to end: all losses at once.

    s_0 = P_S f_S,  s_i = s_{i-1} + P_i f_i                  i = 1 .. k
    r_i = sg(f_T - s_{i-1})                                  sg: stop-gradient, a switch
    z_i = h(GAP(s_i)),  z = z_k
    L   = w D(f_T, s_0) + (alpha w / k) sum_i d^(i-1) D(r_i, P_i f_i) + L_y(z) + v L_y(z_0)
    L_y(z) = c CE(z, y) [+ b X(T, (f_S, z), y)]              the task loss

With sg each D teaches one branch alone, and only L_y reaches all of them; without, what A cannot learn pulls at S too
(a switch in the manner of ERA's gap_model_detach; Yan et al., arXiv 2508.16050). The weights d^(i-1), which are 1, 1/2,
1/4, .. for d = 1/2, and the mean over branches are ERA's as well. The task loss on T's own head over the imitated map
is ERA's too (SimKD, Chen et al., CVPR 2022, reuses the head and leaves it frozen); that it is the loss of another
distillation, on the logits of the sum, is this project's, as is the whole: the paper's own end-to-end loss is not
public. X reads S's own stage maps beside the logits. v pays where S alone answers easy images (early exit). h is
trained along from T's weights or from fresh ones, or is T's, frozen.

Without assistants (k = 0) L is w D(f_T, s_0) + L_y(z_0): the control "S0, same losses".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork, pool
from rkd_deploy.train.methods.base import Losses, Method, View, WeightedLoss, view_teacher
from rkd_deploy.train.methods.residual import Distance, explained_variance, match_sizes, staged_distance, sum_maps


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the terms of L: w, alpha, c, v, d, and that of the stages before the last (`residual.py`)."""

    feature: float
    assistant: float
    ce: float
    student: float
    step_decay: float
    stage: float = 1.0


class EndToEnd(Method):
    """Trains S, its assistants and the head together, by all losses at once.

    Args:
        teacher: T, frozen.
        model: S, its assistants, of which there may be none, and head.
        distance: D.
        weights: Weights of the terms of L.
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
        """The loss L of a batch, its terms in the order of the formula."""
        w, model = self.weights, self.model
        shared = model.shared(x_NCHW)
        maps = model.stage_maps(0, x_NCHW, shared)
        s = model.compared_maps(0, maps)
        teacher_view = view_teacher(self.inferring(self.teacher), x_NCHW)
        f_T, resized_s = match_sizes(model.targets(teacher_view.maps), s)
        z_S = model.head(pool(s[-1]))
        error, last = staged_distance(self.distance, w.stage, f_T, resized_s, f_T)
        total, parts = w.feature * error, {"student": last.detach()}

        k = len(model.assistants)
        for i in range(1, k + 1):
            r = [t - m for t, m in zip(f_T, resized_s, strict=True)]
            f_A = model.compared_maps(i, model.stage_maps(i, x_NCHW, shared))
            _, resized_f_A = match_sizes(r, f_A)
            # Without detach, A's error would also pull S towards maps whose residual is easy, which is not what r is
            # for.
            target = [residual.detach() for residual in r] if self.detach else r
            error, last = staged_distance(self.distance, w.stage, target, resized_f_A, f_T)
            # Over k: the weight of all assistants together does not grow with their number.
            total = total + w.assistant * w.feature / k * w.step_decay ** (i - 1) * error
            parts["assistant" if i == 1 else f"assistant_{i}"] = last.detach()
            # Both sums go on: losses compare at the smaller size, the head pools the sum at S's own.
            s, resized_s = sum_maps(s, f_A), sum_maps(resized_s, resized_f_A)
        parts["explained"] = explained_variance(f_T[-1], resized_s[-1])

        z = model.head(pool(s[-1])) if k else z_S
        task, of_sum = self._task(teacher_view, View(maps, z), y_N)
        total, parts = total + task, parts | of_sum
        if k and w.student:
            task, of_student = self._task(teacher_view, View(maps, z_S), y_N)
            total = total + w.student * task
            parts |= {f"{name}_student": value for name, value in of_student.items()}
        return Losses(total, parts, z.detach())

    def _task(self, teacher_view: View, network: View, y_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The task loss L_y of a network's logits, and its terms for the log."""
        ce = cross_entropy(network.logits_NK, y_N)
        total, parts = self.weights.ce * ce, {"ce": ce.detach()}
        if self.base is not None:
            weighted, parts["base"] = self.base(teacher_view, network, y_N)
            total = total + weighted
        return total, parts

    def deployable(self) -> nn.Module:
        """S + A under the head; S where there are no assistants."""
        return self.model

    def auxiliary(self) -> nn.Module | None:
        """The borrowed loss X, which holds its adapters; None without it."""
        return self.base

    def start_epoch(self, epoch: int) -> None:
        """Set the weight of the borrowed loss X for the epoch."""
        if self.base is not None:
            self.base.start_epoch(epoch)

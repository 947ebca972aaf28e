"""Residual distillation (Gao et al., arXiv 2002.09168) progressively: stage by stage.

For k = 1 .. K, and within k for S, then A_1, then A_2, .. (the letters of `rkd_deploy.models.progressive`):

    S:    L_S^k = w D(f_T^k, P_S^k f_S^k) [+ b X]
    A_i:  L_i^k = w D(sg(f_T^k - s_k^{i-1}), P_i^k f_i^k)       s_k^i = P_S^k f_S^k + P_1^k f_1^k + .. + P_i^k f_i^k
    h:    L_h   = CE(h(GAP(s_K)), y)                            only where the head is trained or finetuned

Each line is a phase. It trains one `BranchStage`: the stage's layers, P and Q. What was trained before stands still,
in eval mode, so the input s_{k-1} of a stage is final when the stage is trained; A's stage gives 0 until it is its
turn. Before the last stage there are no logits, so no accuracy is shown. X there is that part of the borrowed loss
which this stage alone decides: a loss that is a sum over stages (AT) gives its term of stage k, a loss of the logits
or of the last map (KD, DKD, SimKD) comes in with the last stage; those that mix stages (FitNet's hint, ReviewKD) do
not fit and are refused by the recipe. The public part of the paper names this scheme and no more: the rest is this
project's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_deploy.models.progressive import ProgressiveStudent
from rkd_deploy.models.staged import FeatureNetwork, pool
from rkd_deploy.train.methods.base import Losses, Method, View, WeightedLoss, match_size, view_teacher
from rkd_deploy.train.methods.residual import Distance, explained_variance


class ProgressiveStep(Method):
    """Trains one stage of one branch, on what the branches before it leave over of T's map.

    Args:
        teacher: T, frozen.
        model: S, its assistants and head.
        weight: w, of D in the loss.
        stage: k, from 1.
        branch: 0 for S, i for A_i.
        distance: D.
        base: b X, or None; read where `branch` is 0.
    """

    def __init__(
        self,
        teacher: FeatureNetwork,
        model: ProgressiveStudent,
        weight: float,
        *,
        stage: int,
        branch: int,
        distance: Distance,
        base: WeightedLoss | None = None,
    ) -> None:
        super().__init__()
        rows = model.rows()
        self.teacher, self.model, self.weight, self.distance = teacher, model.requires_grad_(True), weight, distance
        self.stage, self.branch, self.last = stage, branch, stage == len(rows)
        # The step that learns is a part of the model: not registered again, so that nothing is saved twice.
        self._learning = [rows[stage - 1][branch]]
        self.base = base if branch == 0 and (self.last or (base is not None and base.loss.by_stage)) else None
        others = [step for row in rows for step in row if step is not self._learning[0]]
        self.freeze(teacher, model.head, *others)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The loss L_S^k of S's stage, or L_i^k of an assistant's, of a batch."""
        rows, step = self.model.rows(), self._learning[0]
        with torch.no_grad():
            # Everything before the step that learns stands still, so no gradient has to pass through it: that is what
            # makes a stage cheap to train.
            s_before = self.model.summed_map(x_NCHW, self.stage - 1)
            done = [other(s_before) for other in rows[self.stage - 1][: self.branch]]
        f = step.map(s_before)
        m = step.adapter(f)
        s = sum(done, torch.zeros_like(m))  # of S nothing went before: its residual is T's whole map
        teacher_view = view_teacher(self.inferring(self.teacher), x_NCHW)
        f_T, resized_s = match_size(teacher_view.maps[self.stage - 1 - len(rows)], s)
        _, resized_m = match_size(f_T, m)
        error = self.distance(f_T - resized_s, resized_m, f_T)
        parts = {
            "assistant" if self.branch else "student": error.detach(),
            "explained": explained_variance(f_T, resized_s + resized_m),
        }
        z = self.model.head(pool(s + m)) if self.last else None
        total = self.weight * error
        if self.base is not None:
            weighted, parts["base"] = self.base(*self._views(teacher_view, f, z), y_N)
            total = total + weighted
        return Losses(total, parts, None if z is None else z.detach())

    def deployable(self) -> nn.Module | None:
        """S alone or S + A once the last stage is trained; None before, where there are no logits.

        Assistants that are yet to learn add nothing.
        """
        if not self.last:
            return None
        return self.model if self.branch else self.model.alone()

    def auxiliary(self) -> nn.Module | None:
        """The borrowed loss X, which holds its adapters; None without it."""
        return self.base

    def start_epoch(self, epoch: int) -> None:
        """Set the weight of the borrowed loss X for the epoch."""
        if self.base is not None:
            self.base.start_epoch(epoch)

    def _views(self, teacher_view: View, f_NCHW: Tensor, z_NK: Tensor | None) -> tuple[View, View]:
        """T and S as X sees them: the map of this stage alone, and the logits where there are any."""
        f_T = teacher_view.maps[self.stage - 1 - len(self.model.steps)]
        # Before the last stage S has no logits, and only losses that read none get here (`__init__`): T's stand in.
        z_NK = teacher_view.logits_NK if z_NK is None else z_NK
        return View((f_T,), teacher_view.logits_NK), View((f_NCHW,), z_NK)

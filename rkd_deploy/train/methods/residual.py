"""Residual distillation (Gao et al., arXiv 2002.09168) in sequence: S, then each A, then h.

    S:      L_S = w D(f_T, P_S f_S) [+ b X(T, S, y)]
    target: r_i = stop_gradient(f_T - s_{i-1}),  s_i = P_S f_S + P_1 f_1 + .. + P_i f_i      S, A_1 .. A_{i-1} frozen,
    A_i:    L_i = w D(r_i, P_i f_i)                                                          batch norm in eval mode
    h:      L_h = CE(h(GAP(s_k)), y)     only where the head is trained or finetuned; S and every A frozen

With `method.stages` the residual is taken at stages j before the last too, where adapters R to T's channels exist for
training only; D then stands for D(..) + v sum_j D(f_T^j - .., R_b^j f_b^j), each stage with a sum of its own.

f are the last stage maps, P the 1x1 adapters to T's channels, D a distance (`DISTANCES`), w its weight, X a borrowed
loss ("residual + X"), which sees S's own stage maps and S's logits under T's head. T is frozen throughout and in eval
mode. Maps of T and of the sum that differ in height or width are compared at the smaller of both sizes, the larger map
average-pooled to it (SimKD's rule); the sum itself keeps S's size. k = 1 is the paper's single assistant A. Only the
abstract of the paper and a summary of its journal version are public: the order of the steps, the choice of D and where
X is applied are this project's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss

from rkd_deploy.models.progressive import ProgressiveStudent
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.staged import FeatureNetwork, pool
from rkd_deploy.train.methods.base import Losses, Method, View, WeightedLoss, match_size, promoted, view_teacher

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A distance D(target, map, T's map); `relative` measures a residual in units of T's map too."""

_TINY = 1e-12  # |t|^2 of a target that is nothing but zeros


def relative(t_NCHW: Tensor, m_NCHW: Tensor, f_T_NCHW: Tensor | None = None) -> Tensor:
    """Squared error over the mean square of T's map: the share of it that is not explained.

    A residual is measured in units of T's map, not of its own: what S and A leave over is one quantity, and an A whose
    target is small already pulls no harder for that.

    Args:
        t_NCHW: Target: T's map or a residual of it.
        m_NCHW: The map that is to be like the target.
        f_T_NCHW: T's map. Default: the target.
    """
    t_NCHW, m_NCHW = promoted(t_NCHW), promoted(m_NCHW)
    f_T_NCHW = t_NCHW if f_T_NCHW is None else promoted(f_T_NCHW)
    return mse_loss(m_NCHW, t_NCHW) / f_T_NCHW.square().mean().clamp_min(_TINY)


def mse(t_NCHW: Tensor, m_NCHW: Tensor, _f_T_NCHW: Tensor | None = None) -> Tensor:
    """Mean squared error of a map over all elements."""
    return mse_loss(m_NCHW, t_NCHW)


def normalised_mse(t_NCHW: Tensor, m_NCHW: Tensor, _f_T_NCHW: Tensor | None = None) -> Tensor:
    """Squared error of a map over the target's square, image by image, then the mean."""
    t_NCHW, m_NCHW = promoted(t_NCHW), promoted(m_NCHW)
    error_N = (t_NCHW - m_NCHW).square().flatten(1).sum(1)
    return (error_N / t_NCHW.square().flatten(1).sum(1).clamp_min(_TINY)).mean()


def smooth_l1(t_NCHW: Tensor, m_NCHW: Tensor, _f_T_NCHW: Tensor | None = None) -> Tensor:
    """Smooth L1 error of a map: squared near 0, linear beyond 1."""
    return smooth_l1_loss(m_NCHW, t_NCHW)


def cosine(t_NCHW: Tensor, m_NCHW: Tensor, _f_T_NCHW: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between target and map, image by image, then the mean."""
    t, m = promoted(t_NCHW).flatten(1), promoted(m_NCHW).flatten(1)
    t_norm_N = t.norm(dim=1).clamp_min(_TINY**0.5)
    # The gradient of an angle grows as 1 / |m|, and an A begins near zero: its first step would be enormous. Below a
    # tenth of the target's length the map's own no longer divides.
    m_norm_N = torch.maximum(m.norm(dim=1), t_norm_N / 10)
    cosine_N: Tensor = (t * m).sum(1) / (t_norm_N * m_norm_N)
    return 1 - cosine_N.mean()


DISTANCES: dict[str, Distance] = {
    "relative": relative,
    "mse": mse,
    "normalised_mse": normalised_mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}


@torch.no_grad()
def explained_variance(target_NCHW: Tensor, sum_NCHW: Tensor) -> Tensor:
    """Share of the target's mean square that a map explains: 0 for a map of zeros, 1 for the target itself."""
    return 1 - mse_loss(sum_NCHW, target_NCHW) / target_NCHW.square().mean()


def staged_distance(
    distance: Distance, stage_weight: float, targets: Sequence[Tensor], maps: Sequence[Tensor], maps_T: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The distance over all stages, D + v sum_j D_j with j before the last, and D at the last stage alone.

    Args:
        distance: D.
        stage_weight: v.
        targets: A target for each stage, the last stage last.
        maps: Maps that are compared with the targets, of the same shapes.
        maps_T: f_T at each stage.
    """
    *early, last = [distance(t, m, f_T) for t, m, f_T in zip(targets, maps, maps_T, strict=True)]
    return (last + stage_weight * torch.stack(early).sum() if early else last), last


def match_sizes(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pool the maps of two networks stage by stage, each pair to the smaller height and width of the two."""
    pairs = [match_size(map_a, map_b) for map_a, map_b in zip(a, b, strict=True)]
    return [map_a for map_a, _ in pairs], [map_b for _, map_b in pairs]


def sum_maps(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Add the maps of two branches, stage by stage."""
    return [map_a + map_b for map_a, map_b in zip(a, b, strict=True)]


class StudentStep(Method):
    """Trains S to give T's map.

    Args:
        teacher: T, frozen.
        model: S, its assistants and head; only S and its adapters are trained.
        weight: w, the weight of D in the loss.
        distance: D.
        stage_weight: v.
        base: b X, or None.
    """

    def __init__(
        self,
        teacher: FeatureNetwork,
        model: ResidualStudent,
        weight: float,
        *,
        distance: Distance = relative,
        stage_weight: float = 1.0,
        base: WeightedLoss | None = None,
    ) -> None:
        super().__init__()
        # Everything trains before it is frozen: an earlier phase may have frozen what this one trains.
        self.teacher, self.model, self.base = teacher, model.requires_grad_(True), base
        self.distance, self.weight, self.stage_weight = distance, weight, stage_weight
        others = [module for branch in range(1, len(model.branches())) for module in model.parts(branch)]
        self.freeze(teacher, model.head, *others)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The loss L_S = w D(f_T, P_S f_S) [+ b X] of a batch."""
        # S before T: T is frozen, and may be computed meanwhile on another stream (`passes.py`).
        maps = self.model.stage_maps(0, x_NCHW, self.model.shared(x_NCHW))
        s = self.model.compared_maps(0, maps)
        teacher_view = view_teacher(self.inferring(self.teacher), x_NCHW)
        z_S = self.model.head(pool(s[-1]))
        f_T, resized_s = match_sizes(self.model.targets(teacher_view.maps), s)
        error, last = staged_distance(self.distance, self.stage_weight, f_T, resized_s, f_T)
        total = self.weight * error
        parts = {"student": last.detach(), "explained": explained_variance(f_T[-1], resized_s[-1])}
        if self.base is not None:
            weighted, parts["base"] = self.base(teacher_view, View(maps, z_S), y_N)
            total = total + weighted
        return Losses(total, parts, z_S.detach())

    def deployable(self) -> nn.Module:
        """S without its assistants, under the head."""
        return StudentAlone(self.model)

    def auxiliary(self) -> nn.Module | None:
        """The borrowed loss X, which holds its adapters; None without it."""
        return self.base

    def start_epoch(self, epoch: int) -> None:
        """Set the weight of the borrowed loss X for the epoch."""
        if self.base is not None:
            self.base.start_epoch(epoch)


class AssistantStep(Method):
    """Trains A_i on what S and the assistants before it leave over of T's map.

    Args:
        teacher: T, frozen.
        model: S, its assistants and head; only A_i and its adapters are trained.
        weight: w, the weight of D in the loss.
        distance: D.
        stage_weight: v.
        number: i, from 1.
    """

    def __init__(
        self,
        teacher: FeatureNetwork,
        model: ResidualStudent,
        weight: float,
        *,
        distance: Distance = relative,
        stage_weight: float = 1.0,
        number: int = 1,
    ) -> None:
        super().__init__()
        self.teacher, self.model, self.number = teacher, model.requires_grad_(True), number
        self.distance, self.weight, self.stage_weight = distance, weight, stage_weight
        others = [m for branch in range(len(model.branches())) if branch != number for m in model.parts(branch)]
        self.freeze(teacher, model.head, *others)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The loss L_i = w D(r_i, P_i f_i) of a batch, with r_i = f_T - s_{i-1}."""
        model = self.model
        with torch.no_grad():
            shared = model.shared(x_NCHW)
        # A first: what is frozen may be computed meanwhile (`recording.py`).
        f_A = model.compared_maps(self.number, model.stage_maps(self.number, x_NCHW, shared))
        with torch.no_grad():
            before = [self._before(branch, x_NCHW, shared) for branch in range(self.number)]
            s = functools.reduce(sum_maps, before)
            f_T, resized_s = match_sizes(model.targets(self.inferring(self.teacher).features(x_NCHW)), s)
            r = [t - m for t, m in zip(f_T, resized_s, strict=True)]
        # r has the smaller of T's and S's sizes already; A's maps have S's, so only they are pooled here.
        _, resized_f_A = match_sizes(r, f_A)
        error, last = staged_distance(self.distance, self.stage_weight, r, resized_f_A, f_T)
        with torch.no_grad():
            parts = {
                "assistant": last.detach(),
                "explained": explained_variance(f_T[-1], resized_s[-1] + resized_f_A[-1]),
            }
            logits_NK = model.head(pool(s[-1] + f_A[-1]))
        return Losses(self.weight * error, parts, logits_NK)

    def frozen_networks(self) -> list[FeatureNetwork]:
        """T, S, and the assistants before this one."""
        return [self.teacher, *(network for network, _ in self.model.branches()[: self.number])]

    def _before(self, branch: int, x_NCHW: Tensor, shared: tuple[Tensor, ...]) -> list[Tensor]:
        """The compared maps of a branch that stands still."""
        network = self.inferring(self.model.branches()[branch][0])
        maps = (*shared, *network.features(shared[-1] if shared else x_NCHW))
        return self.model.compared_maps(branch, maps)

    def deployable(self) -> nn.Module:
        """S and all assistants under the head; those that are yet to learn add nothing."""
        return self.model


class HeadStep(Method):
    """Trains the head to classify the finished sum.

    Args:
        model: S, its assistants and head; only the head is trained.
    """

    def __init__(self, model: ResidualStudent | ProgressiveStudent) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        # All but the head, and not S and A by name: adapters, a trunk and the exchanges of scheme progressive stand
        # still too.
        self.freeze(*(child for child in model.children() if child is not model.head))

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The loss L_h = CE(h(GAP(s_k)), y) of a batch."""
        with torch.no_grad():
            pooled_NC = pool(self.model.summed_map(x_NCHW))
        logits_NK = self.model.head(pooled_NC)
        loss = cross_entropy(logits_NK, y_N)
        return Losses(loss, {"ce": loss.detach()}, logits_NK.detach())

    def deployable(self) -> nn.Module:
        """S + A under the head that is trained."""
        return self.model

"""Interfaces of a training method and of a loss borrowed from another paper.

A borrowed loss X sees two networks and the labels, and gives a number. It serves twice: for S within residual
distillation ("residual + X") and for a whole network alone, as the baseline X. So it knows neither network, and gets a
`View` of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from rkd_deploy.models.staged import FeatureNetwork


class View(NamedTuple):
    """The maps and logits of a network for one batch: all that a borrowed loss sees of it.

    Attributes:
        maps: The map after each stage, [N, C_i, H_i, W_i], deepest last.
        logits_NK: The logits z.
    """

    maps: tuple[Tensor, ...]
    logits_NK: Tensor


class BaseLoss(nn.Module, ABC):
    """A loss X(T, S, y) of another paper. Adapters that it trains are its own parameters and are not shipped.

    Attributes:
        weight: Factor of X in the published protocol.
        ce_weight: Factor of cross-entropy beside X in the published protocol.
        warmup_epochs: Epochs over which the published protocol raises the factor linearly; 0: full from the start.
        by_stage: Whether X is a sum of one term for each stage, which reads that stage's map alone.
    """

    weight: ClassVar[float]
    ce_weight: ClassVar[float] = 1.0
    warmup_epochs: ClassVar[int] = 0
    by_stage: ClassVar[bool] = False

    @abstractmethod
    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            teacher: View of T, without gradients.
            student: View of the network that is trained.
            y_N: Labels [N], or probabilities [N, K].
        """


class WeightedLoss(nn.Module):
    """A borrowed loss times its weight: b(e) X with b(e) = b min(1, e / warmup_epochs) in epoch e = 1, 2, ...

    Args:
        loss: X.
        weight: b. Default: the published weight.
        warmup_epochs: Epochs until the full weight. Default: the published number.
    """

    def __init__(self, loss: BaseLoss, weight: float | None = None, warmup_epochs: int | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.full_weight = loss.weight if weight is None else weight
        self.warmup_epochs = loss.warmup_epochs if warmup_epochs is None else warmup_epochs
        self.weight = self.full_weight

    def start_epoch(self, epoch: int) -> None:
        """Set the weight b(e) of an epoch e, counted from 1."""
        self.weight = self.full_weight * (min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0)

    def forward(self, teacher: View, student: View, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss b X, and X itself for the log."""
        # Maps stay as they are: autocast runs mse_loss in float32 by itself, and losses that do more promote them.
        teacher, student = (View(view.maps, promoted(view.logits_NK)) for view in (teacher, student))
        value: Tensor = self.loss(teacher, student, y_N)
        return self.weight * value, value.detach()


@torch.no_grad()
def view_teacher(teacher: FeatureNetwork, x_NCHW: Tensor) -> View:
    """The maps and logits of T for a batch [N, 3, H, W], without gradients."""
    return View(*teacher.maps_and_logits(x_NCHW))


def promoted(x: Tensor) -> Tensor:
    """The tensor in float32 at least: bfloat16 of autocast is too coarse for small differences of maps and logits."""
    return x if x.dtype.itemsize >= 4 else x.float()


def pair_stages(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of stage maps (T, S), counted from the deepest; of the network with more stages the first are left out."""
    count = min(len(teacher), len(student))
    return list(zip(teacher[-count:], student[-count:], strict=True))


def match_size(a_NCHW: Tensor, b_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller height and the smaller width of the two."""
    height, width = (min(sizes) for sizes in zip(a_NCHW.shape[-2:], b_NCHW.shape[-2:], strict=True))
    return resized(a_NCHW, height, width), resized(b_NCHW, height, width)


def resized(map_NCHW: Tensor, height: int, width: int) -> Tensor:
    """A map average-pooled to a height and width in pixels; returned as it is where it has that size."""
    return map_NCHW if map_NCHW.shape[-2:] == (height, width) else adaptive_avg_pool2d(map_NCHW, (height, width))


class Losses(NamedTuple):
    """The loss of one batch, its parts for the log, and the logits for the training accuracy.

    Attributes:
        total: Scalar; backward() is called on this one.
        parts: Scalars that explain `total`, detached, for the log only.
        logits_NK: Logits, detached; None while the network has none yet.
    """

    total: Tensor
    parts: dict[str, Tensor]
    logits_NK: Tensor | None


class Method(nn.Module, ABC):
    """A training method: owns what is trained and what is frozen, and knows nothing of the loop.

    Frozen networks are handed over through `freeze`: their parameters get no gradient, and they stay in eval mode
    (batch norm uses and keeps its running statistics) whatever mode the method is set to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []  # a list, so that what is frozen is neither registered nor saved twice
        self._stand_ins: dict[FeatureNetwork, FeatureNetwork] = {}

    @abstractmethod
    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The losses of one batch of normalised images [N, C, H, W] and labels [N], or probabilities [N, K]."""

    @abstractmethod
    def deployable(self) -> nn.Module | None:
        """The network that is trained as it would be shipped, images to logits; None while it has no logits."""

    def auxiliary(self) -> nn.Module | None:
        """The module that is trained along and not shipped: checkpoints hold it, weights files do not."""
        return None

    def start_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 1; called before each, also when training is resumed within one."""

    def freeze(self, *modules: nn.Module) -> None:
        """Keep modules out of training: no gradients, and eval mode for good."""
        for module in modules:
            module.requires_grad_(False).eval()
            self._frozen.append(module)

    def frozen_networks(self) -> list[FeatureNetwork]:
        """The networks that `inferring` is asked for: T, where there is one."""
        children = list(self.children())
        return [net for net in self._frozen if isinstance(net, FeatureNetwork) and any(net is c for c in children)]

    def stand_in(self, copies: Mapping[FeatureNetwork, FeatureNetwork]) -> None:
        """Let copies infer in the place of frozen networks, because they are faster; none: the networks themselves."""
        self._stand_ins = dict(copies)

    def inferring(self, network: FeatureNetwork) -> FeatureNetwork:
        """What infers in the place of a frozen network."""
        return self._stand_ins.get(network, network)

    def epoch_weights(self) -> tuple[float, ...]:
        """Weights of the losses that `start_epoch` may change."""
        return tuple(module.weight for module in self.modules() if isinstance(module, WeightedLoss))

    def train(self, mode: bool = True) -> Method:
        """Set the mode of what is trained; what is frozen stays in eval mode."""
        super().train(mode)
        # `train` has just set everything to training: batch norm of a frozen network would take this batch's
        # statistics, and keep them.
        for module in self._frozen:
            module.eval()
        return self

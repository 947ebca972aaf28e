"""What every borrowed loss has in common: it sees two networks and the labels, and gives a number.

The same loss serves twice: for S within residual distillation ("residual + X") and for a whole network alone, as the
baseline X. So it knows neither; it gets a view of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from rkd_deploy.models.staged import FeatureNetwork


class View(NamedTuple):
    """What a loss sees of a network.

    Attributes:
        maps: The map after each stage, [N, C_i, H_i, W_i], deepest last.
        logits_NK: z.
    """

    maps: tuple[Tensor, ...]
    logits_NK: Tensor


class BaseLoss(nn.Module, ABC):
    """X(T, S, y). Adapters that it trains along are its own parameters: they are not shipped.

    Attributes:
        weight: Its factor in the published protocol.
        ce_weight: The factor of cross-entropy beside it there.
        warmup_epochs: Its factor rises linearly over so many epochs there; 0: it is whole from the start.
        by_stage: It is a sum of one term for each stage, which reads that stage's map alone.
    """

    weight: ClassVar[float]
    ce_weight: ClassVar[float] = 1.0
    warmup_epochs: ClassVar[int] = 0
    by_stage: ClassVar[bool] = False

    @abstractmethod
    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """A scalar. The teacher's view carries no gradient; y may be soft targets [N, K]."""


class WeightedLoss(nn.Module):
    """b(e) X with b(e) = b min(1, e / warmup_epochs) in epoch e = 1, 2, ...

    Args:
        loss: X.
        weight: b. Default: the published one.
        warmup_epochs: Default: the published one.
    """

    def __init__(self, loss: BaseLoss, weight: float | None = None, warmup_epochs: int | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.full_weight = loss.weight if weight is None else weight
        self.warmup_epochs = loss.warmup_epochs if warmup_epochs is None else warmup_epochs
        self.weight = self.full_weight

    def start_epoch(self, epoch: int) -> None:
        """Set b to that of an epoch, counted from 1."""
        self.weight = self.full_weight * (min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0)

    def forward(self, teacher: View, student: View, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss b X, and X itself for the log."""
        teacher, student = (View(view.maps, promoted(view.logits_NK)) for view in (teacher, student))
        value: Tensor = self.loss(teacher, student, y_N)
        return self.weight * value, value.detach()


@torch.no_grad()
def view_teacher(teacher: FeatureNetwork, x_NCHW: Tensor) -> View:
    """T's view, without a graph behind it."""
    return View(*teacher.maps_and_logits(x_NCHW))


def promoted(x: Tensor) -> Tensor:
    """In float32 at least: under autocast maps and logits come as bfloat16, too coarse for their small differences."""
    return x if x.dtype.itemsize >= 4 else x.float()


def paired(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Stage maps of T and S that belong together: counted from the deepest, where T has more stages or fewer."""
    count = min(len(teacher), len(student))
    return list(zip(teacher[-count:], student[-count:], strict=True))


def alike(one_NCHW: Tensor, other_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at the same height and width: the larger one is average-pooled."""
    height, width = (min(sizes) for sizes in zip(one_NCHW.shape[-2:], other_NCHW.shape[-2:], strict=True))
    return sized(one_NCHW, height, width), sized(other_NCHW, height, width)


def sized(map_NCHW: Tensor, height: int, width: int) -> Tensor:
    """The map average-pooled to a height and width, where it has another one."""
    return map_NCHW if map_NCHW.shape[-2:] == (height, width) else adaptive_avg_pool2d(map_NCHW, (height, width))


class Losses(NamedTuple):
    """What one forward pass gives.

    Attributes:
        total: Scalar; backward() is called on this one.
        parts: Scalars that explain it, detached, for the log only.
        logits_NK: For the training accuracy, detached; None while the network has no logits yet.
    """

    total: Tensor
    parts: dict[str, Tensor]
    logits_NK: Tensor | None


class Method(nn.Module, ABC):
    """Owns what is trained and what is frozen; knows nothing of the loop.

    Frozen networks are handed over through `freeze`: their parameters get no gradient, and they stay in eval mode
    (batch norm uses and keeps its running statistics) whatever mode the method is set to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []  # a list, so that what is frozen is neither registered nor saved twice

    @abstractmethod
    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """Loss of one batch: normalised images [N, C, H, W] and labels [N], or targets [N, K] where they are soft."""

    @abstractmethod
    def deployable(self) -> nn.Module | None:
        """The network this method trains, as it would be shipped: images to logits. None while it gives no logits."""

    def auxiliary(self) -> nn.Module | None:
        """What is trained along and not shipped: checkpoints hold it, weights do not."""
        return None

    def start_epoch(self, epoch: int) -> None:
        """Called before epoch 1, 2, ..., also when training is resumed in it."""

    def freeze(self, *modules: nn.Module) -> None:
        """Keep these out of training."""
        for module in modules:
            module.requires_grad_(False).eval()
            self._frozen.append(module)

    def train(self, mode: bool = True) -> Method:
        """Set the mode of what is trained; what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

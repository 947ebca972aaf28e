"""What the loop knows of a training method: a loss to minimise, and a network to ship."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


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

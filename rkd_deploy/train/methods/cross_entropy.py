"""Plain supervised training: the teacher's, where none is given, and the baseline's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rkd_deploy.train.methods.base import Losses, Method


class CrossEntropy(Method):
    """L = CE(model(x), y).

    Args:
        model: Images to logits; trained as a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """Mean cross-entropy of the batch."""
        logits_NK = self.model(x_NCHW)
        loss = cross_entropy(logits_NK, y_N)
        return Losses(loss, {"ce": loss.detach()}, logits_NK.detach())

    def deployable(self) -> nn.Module:
        """The model itself."""
        return self.model

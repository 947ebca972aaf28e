"""Trains a whole network, alone or by one borrowed loss: baselines and controls.

    L = c CE(z, y) + b X(T, network, y)

T is frozen and in eval mode.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train.methods.base import Losses, Method, View, WeightedLoss, view_teacher
from rkd_deploy.train.methods.simkd import ReusedClassifier


class Distilled(Method):
    """Trains a whole network by cross-entropy and a borrowed loss; a head reused from T stays frozen.

    Args:
        teacher: T, frozen.
        network: S0, trained as a whole.
        base: b X.
        ce_weight: c.
    """

    def __init__(self, teacher: FeatureNetwork, network: FeatureNetwork, base: WeightedLoss, ce_weight: float) -> None:
        super().__init__()
        self.teacher, self.network, self.base, self.ce_weight = teacher, network.requires_grad_(True), base, ce_weight
        self.freeze(teacher)
        if isinstance(network, ReusedClassifier):
            self.freeze(network.fc)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The loss c CE + b X of a batch."""
        maps, z = self.network.maps_and_logits(x_NCHW)
        ce = cross_entropy(z, y_N)
        weighted, value = self.base(view_teacher(self.inferring(self.teacher), x_NCHW), View(maps, z), y_N)
        parts = {"ce": ce.detach(), "base": value}
        return Losses(self.ce_weight * ce + weighted, parts, z.detach())

    def deployable(self) -> nn.Module:
        """The trained network itself."""
        return self.network

    def auxiliary(self) -> nn.Module:
        """The borrowed loss, which holds its adapters."""
        return self.base

    def start_epoch(self, epoch: int) -> None:
        """Set the weight of the borrowed loss for the epoch."""
        self.base.start_epoch(epoch)


class CrossEntropy(Method):
    """Trains a network by cross-entropy alone, L = CE(model(x), y).

    Args:
        model: Images to logits; trained as a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """The mean cross-entropy of a batch."""
        logits_NK = self.model(x_NCHW)
        loss = cross_entropy(logits_NK, y_N)
        return Losses(loss, {"ce": loss.detach()}, logits_NK.detach())

    def deployable(self) -> nn.Module:
        """The trained network itself."""
        return self.model

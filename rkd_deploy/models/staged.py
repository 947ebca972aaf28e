"""A classifier seen as stem, stages and head.

Distillation compares stage maps, separation narrows stages, fusion folds heads: all three need this view of a network
and nothing else of it. Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Staged(nn.Module, ABC):
    """A network that shows its stage maps and can be built again at other widths.

    Attributes:
        widths: Channels of the stem and of every stage, in order.
        fc: The linear classifier on the pooled last map, or None for a bare feature extractor.
    """

    widths: tuple[int, ...]
    fc: nn.Linear | None

    @abstractmethod
    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The map after each stage, [N, widths[i + 1], H_i, W_i], deepest last."""

    @abstractmethod
    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> Staged:
        """The same topology with other widths and fresh weights; no head when `num_classes` is None."""

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return self.widths[-1]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K], or the pooled last map [N, C] of a network without a head."""
        pooled_NC = pool(self.features(x_NCHW)[-1])
        return pooled_NC if self.fc is None else self.fc(pooled_NC)


def pool(map_NCHW: Tensor) -> Tensor:
    """Global average pooling (GAP): [N, C, H, W] to [N, C]."""
    # Not adaptive_avg_pool2d: the ONNX exporter turns that into a dozen shape computations around one mean.
    return map_NCHW.mean((2, 3))

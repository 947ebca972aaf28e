"""Mixup, cutmix and label smoothing: batches whose labels are distributions.

    mixup  (Zhang et al. 2018, arXiv 1710.09412)    x' = lambda x_i + (1 - lambda) x_{i-1}
    cutmix (Yun et al. 2019, arXiv 1905.04899)      a box of x_i, of 1 - lambda of its area, is taken from x_{i-1}
                                                    y' = lambda y_i + (1 - lambda) y_{i-1},  lambda ~ Beta(alpha, alpha)
    smoothing (Szegedy et al. 2016)                 y' = (1 - epsilon) y + epsilon / K

The partner of an image is the one before it in the batch, and one lambda (and box) serves the batch, as in torchvision.
Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot


class Box(NamedTuple):
    """Rows top to bottom and columns left to right, the ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What is done to a batch once its images are augmented and normalised.

    Attributes:
        classes: K.
        mixup: alpha; 0: off.
        cutmix: alpha; 0: off. Where both are on, a fair coin decides for each batch.
        label_smoothing: epsilon.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether an image needs the one before it."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch and its targets.

        Args:
            x_NCHW: Normalised images; where this mixes, one more in front: the partner of the first.
            y_N: Their labels.
            random: Decides lambda, box and coin.

        Returns:
            Images, and targets: int64 [N] where nothing mixes or smooths, else float32 [N, K].
        """
        if not self.mixes:
            return x_NCHW, self._targets(y_N) if self.label_smoothing else y_N
        target_NK = self._targets(y_N)
        cuts = self.cutmix > 0 and (self.mixup == 0 or random.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(random.beta(alpha, alpha))
        if cuts:
            box = draw_box(share, (x_NCHW.shape[2], x_NCHW.shape[3]), random)
            x_NCHW, share = cutmix(x_NCHW[1:], x_NCHW[:-1], box)
        else:
            x_NCHW = mixup(x_NCHW[1:], x_NCHW[:-1], share)
        return x_NCHW, mixup(target_NK[1:], target_NK[:-1], share)

    def _targets(self, y_N: Tensor) -> Tensor:
        return smoothed(y_N, self.classes, self.label_smoothing)


def smoothed(y_N: Tensor, classes: int, epsilon: float) -> Tensor:
    """(1 - epsilon) one_hot(y) + epsilon / K, float32 [N, K]."""
    return one_hot(y_N, classes).float().mul_(1 - epsilon).add_(epsilon / classes)


def mixup(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Share of one, and the rest of the other."""
    return other.lerp(one, share)


def cutmix(one_NCHW: Tensor, other_NCHW: Tensor, box: Box) -> tuple[Tensor, float]:
    """One with a box of the other, and the share of its area that is left of it."""
    top, left, bottom, right = box
    height, width = one_NCHW.shape[-2:]
    pasted = one_NCHW.clone()
    pasted[..., top:bottom, left:right] = other_NCHW[..., top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def draw_box(share: float, size: tuple[int, int], random: np.random.Generator) -> Box:
    """A box of 1 - share of the area and of the image's aspect, its centre anywhere, cut off at the edges."""
    spans = []
    for length in size:
        centre, half = int(random.integers(length)), int(0.5 * math.sqrt(1 - share) * length)
        spans.append((max(centre - half, 0), min(centre + half, length)))
    (top, bottom), (left, right) = spans
    return Box(top, left, bottom, right)


def hard_labels(y: Tensor) -> Tensor:
    """The class of each image, int64 [N], of labels [N] or of targets [N, K]: the largest one."""
    return y if y.ndim == 1 else y.argmax(1)

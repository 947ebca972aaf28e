"""Augments training images: crops, flips, mixup, cutmix, label smoothing, by whole batches.

    mixup  (Zhang et al. 2018, arXiv 1710.09412)    x' = lambda x_i + (1 - lambda) x_{i-1}
    cutmix (Yun et al. 2019, arXiv 1905.04899)      a box of x_i, of 1 - lambda of its area, is taken from x_{i-1}
                                                    y' = lambda y_i + (1 - lambda) y_{i-1},  lambda ~ Beta(alpha, alpha)
    smoothing (Szegedy et al. 2016)                 y' = (1 - epsilon) y + epsilon / K

The partner of an image is the one before it in the batch, and one lambda (and box) serves the batch, as in torchvision.
Crops and flips move whole batches on the device; their random numbers come from outside, so that an epoch is the same
on every device.
Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot


class Box(NamedTuple):
    """A box of pixels: rows top to bottom and columns left to right, the ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup, cutmix and label smoothing of a batch whose images are augmented and normalised.

    Attributes:
        classes: K, the number of classes.
        mixup: alpha of mixup; 0: off.
        cutmix: alpha of cutmix; 0: off. Where both are on, a fair coin decides for each batch.
        label_smoothing: epsilon of label smoothing; 0: off.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether a batch needs one image more in front, the partner of its first."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch, and give its targets.

        Args:
            x_NCHW: Normalised images; where this mixes, one more in front: the partner of the first.
            y_N: Labels of the images.
            random: Draws lambda, box and coin.

        Returns:
            Images, and targets: int64 [N] where nothing mixes or smooths, else float32 [N, K].
        """
        if not self.mixes:
            return x_NCHW, self._targets(y_N) if self.label_smoothing else y_N
        # Smoothed first, then mixed: both are linear in the targets, so the order is free, and one-hot is needed either
        # way.
        target_NK = self._targets(y_N)
        cuts = self.cutmix > 0 and (self.mixup == 0 or random.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        weight = float(random.beta(alpha, alpha))
        if cuts:
            box = draw_box(weight, (x_NCHW.shape[2], x_NCHW.shape[3]), random)
            # The box may be cut off at the edge: the labels take the share that the image really kept.
            x_NCHW, weight = cutmix(x_NCHW[1:], x_NCHW[:-1], box)
        else:
            x_NCHW = mixup(x_NCHW[1:], x_NCHW[:-1], weight)
        return x_NCHW, mixup(target_NK[1:], target_NK[:-1], weight)

    def _targets(self, y_N: Tensor) -> Tensor:
        return smoothed(y_N, self.classes, self.label_smoothing)


def smoothed(y_N: Tensor, classes: int, epsilon: float) -> Tensor:
    """Smoothed targets, (1 - epsilon) one_hot(y) + epsilon / K, float32 [N, K]."""
    return one_hot(y_N, classes).float().mul_(1 - epsilon).add_(epsilon / classes)


def mixup(x: Tensor, partner: Tensor, weight: float) -> Tensor:
    """Mix images or targets with their partners: weight * x + (1 - weight) * partner."""
    # lerp gives x itself at weight 1, bit for bit, which w x + (1 - w) p need not.
    return partner.lerp(x, weight)


def cutmix(x_NCHW: Tensor, partner_NCHW: Tensor, box: Box) -> tuple[Tensor, float]:
    """Paste a box of their partners into images; returns them and the share of the area that is left of each."""
    top, left, bottom, right = box
    height, width = x_NCHW.shape[-2:]
    pasted = x_NCHW.clone()
    pasted[..., top:bottom, left:right] = partner_NCHW[..., top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def draw_box(weight: float, size: tuple[int, int], random: np.random.Generator) -> Box:
    """Draw a box of 1 - weight of the area, of the image's aspect, its centre anywhere, cut off at the edges."""
    spans = []
    for length in size:
        # Sides of sqrt(1 - weight) of the image's: the area, not the side, is to be 1 - weight.
        centre, half = int(random.integers(length)), int(0.5 * math.sqrt(1 - weight) * length)
        spans.append((max(centre - half, 0), min(centre + half, length)))
    (top, bottom), (left, right) = spans
    return Box(top, left, bottom, right)


def hard_labels(y: Tensor) -> Tensor:
    """Class of each image, int64 [N], from labels [N] or from targets [N, K], of which the largest counts."""
    return y if y.ndim == 1 else y.argmax(1)


def pad(images_NCHW: Tensor, padding: int) -> Tensor:
    """Put zeros around every image: [N, C, H + 2P, W + 2P]."""
    return torch.nn.functional.pad(images_NCHW, (padding,) * 4)


def crop(padded_NCHW: Tensor, index_N: Tensor, top_N: Tensor, left_N: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut one window from each of some images.

    Args:
        padded_NCHW: All images, padded.
        index_N: Positions of the images to cut from.
        top_N: First row of each window.
        left_N: First column of each window.
        size: Height and width of the windows.

    Returns:
        [len(index_N), C, *size], a new tensor.
    """
    # A view of every window of every image; indexing it copies only the windows that are wanted.
    windows = padded_NCHW.unfold(2, size[0], 1).unfold(3, size[1], 1)
    return windows[index_N, :, top_N, left_N]


def flip(images_NCHW: Tensor, flipped_N: Tensor) -> Tensor:
    """Mirror the marked images, uint8, left to right."""
    # One of two bytes by exclusive or: on a CPU three times as fast as torch.where with a mask that is broadcast.
    mask_N111 = flipped_N.to(torch.uint8).mul_(255)[:, None, None, None]
    return images_NCHW.flip(3).bitwise_xor_(images_NCHW).bitwise_and_(mask_N111).bitwise_xor_(images_NCHW)


def draw_windows(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw windows of random area and aspect: top, left, height, width, int64 [4, N].

    The distribution is that of torchvision's RandomResizedCrop: area uniform in 8 to 100 % of the image's, aspect
    log-uniform in 3/4 to 4/3; the first of ten draws that fits inside is taken, and the whole image if none does.
    """
    height, width = size
    uniform_2TN = torch.rand(2, 10, count, generator=generator, dtype=torch.float64)
    area_TN = height * width * (0.08 + 0.92 * uniform_2TN[0])
    aspect_TN = torch.exp((2 * uniform_2TN[1] - 1) * math.log(4 / 3))
    sides_2TN = torch.stack([area_TN / aspect_TN, area_TN * aspect_TN]).sqrt().round().long()
    limits = torch.tensor([height, width]).view(2, 1, 1)
    fits_TN = ((sides_2TN > 0) & (sides_2TN <= limits)).all(0)
    first_N = fits_TN.int().argmax(0)  # 0 where none fits
    sides_2N = sides_2TN.gather(1, first_N.expand(2, 1, -1)).squeeze(1)
    sides_2N = torch.where(fits_TN.any(0), sides_2N, limits[:, 0])
    room_2N = limits[:, 0] - sides_2N + 1
    corners_2N = (torch.rand(2, count, generator=generator, dtype=torch.float64) * room_2N).long()
    return torch.cat([corners_2N, sides_2N])


def resized_crop(images_NCHW: Tensor, windows_4N: Tensor) -> Tensor:
    """Cut one window from each image and enlarge it to the image's size, bilinearly.

    Args:
        images_NCHW: uint8 [N, C, H, W].
        windows_4N: Top, left, height and width of each window, inside the image.

    Returns:
        uint8 [N, C, H, W], a new tensor.
    """
    height, width = images_NCHW.shape[-2:]
    top_N1, left_N1, high_N1, wide_N1 = windows_4N.to(images_NCHW.device).float().unsqueeze(-1)
    y_NH = _sample_points(height, top_N1, high_N1)
    x_NW = _sample_points(width, left_N1, wide_N1)
    shape = (len(images_NCHW), height, width)
    grid_NHW2 = torch.stack([x_NW[:, None, :].expand(shape), y_NH[:, :, None].expand(shape)], dim=-1)
    enlarged = torch.nn.functional.grid_sample(images_NCHW.float(), grid_NHW2, align_corners=False)
    return enlarged.round_().to(torch.uint8)


def _sample_points(size: int, start_N1: Tensor, length_N1: Tensor) -> Tensor:
    """Point that each of `size` pixels is sampled at, in grid_sample's units of [-1, 1], within the window."""
    centres_S = torch.arange(size, device=start_N1.device) + 0.5
    # Clamped to the window's own pixels: at its rim bilinear sampling would else read the neighbours outside of it.
    inside_NS = (centres_S * length_N1 / size - 0.5).clamp(min=0).minimum(length_N1 - 1)
    return (2 * (start_N1 + inside_NS) + 1) / size - 1

"""Augmentation of a whole batch at once, as pure functions of tensors.

Every random number is an argument: the caller owns the generator. Equal to torchvision's RandomCrop(padding) and
RandomHorizontalFlip image by image, given the same offsets and flips.
Letters: N batch, C channels, H height, W width, P padding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pad(images_NCHW: Tensor, padding: int) -> Tensor:
    """Zeros around every image: [N, C, H + 2P, W + 2P]."""
    return torch.nn.functional.pad(images_NCHW, (padding,) * 4)


def crop(padded_NCHW: Tensor, index_N: Tensor, top_N: Tensor, left_N: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut one window from each chosen image.

    Args:
        padded_NCHW: All images, padded.
        index_N: Which images.
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
    """Mirror the marked images left to right."""
    return torch.where(flipped_N[:, None, None, None], images_NCHW.flip(3), images_NCHW)

"""Augmentation of a whole batch at once, as pure functions of tensors.

Every random number, or the generator, is an argument. Equal to torchvision's RandomCrop(padding), RandomHorizontalFlip
and RandomResizedCrop image by image, given the same windows and flips.
Letters: N batch, C channels, H height, W width, P padding.
"""

from __future__ import annotations

import math

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
    """Mirror the marked images, uint8, left to right."""
    # One of two bytes by exclusive or: on a CPU three times as fast as torch.where with a mask that is broadcast.
    mask_N111 = flipped_N.to(torch.uint8).mul_(255)[:, None, None, None]
    return images_NCHW.flip(3).bitwise_xor_(images_NCHW).bitwise_and_(mask_N111).bitwise_xor_(images_NCHW)


def draw_windows(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Windows of random area and aspect: top, left, height, width, int64 [4, N].

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
        images_NCHW: uint8.
        windows_4N: Top, left, height and width of each window, inside the image.
    """
    height, width = images_NCHW.shape[-2:]
    top_N1, left_N1, high_N1, wide_N1 = windows_4N.to(images_NCHW.device).float().unsqueeze(-1)
    y_NH = _sources(height, top_N1, high_N1)
    x_NW = _sources(width, left_N1, wide_N1)
    shape = (len(images_NCHW), height, width)
    grid_NHW2 = torch.stack([x_NW[:, None, :].expand(shape), y_NH[:, :, None].expand(shape)], dim=-1)
    enlarged = torch.nn.functional.grid_sample(images_NCHW.float(), grid_NHW2, align_corners=False)
    return enlarged.round_().to(torch.uint8)


def _sources(size: int, start_N1: Tensor, length_N1: Tensor) -> Tensor:
    """Where each of `size` pixels comes from, in grid_sample's units of [-1, 1]; never from outside the window."""
    centres_S = torch.arange(size, device=start_N1.device) + 0.5
    inside_NS = (centres_S * length_N1 / size - 0.5).clamp(min=0).minimum(length_N1 - 1)
    return (2 * (start_N1 + inside_NS) + 1) / size - 1

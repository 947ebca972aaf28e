"""Draws subsets of images by seed, and measures mean and deviation of what is trained on.

Every purpose has a generator of its own: how many training images are used does not change which test images are.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from rkd_deploy.data.splits import AnySplit
from rkd_deploy.errors import DataError

SAMPLE = 2000
"""Most images that mean and standard deviation are measured over: enough for the third decimal."""


def purpose_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator whose random numbers depend on nothing but the seed and the purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def limit(labels_N: Tensor, size: int | None, classes: int, key: str, seed: int) -> Tensor:
    """Draw a subset of images with as even a share of every class as they allow.

    A class that has fewer gives all it has, and the others more; where it is uneven, the first classes have one more.

    Args:
        labels_N: Labels of all images, int64 [N].
        size: Images of the subset; None: all.
        classes: K.
        key: The recipe's key, for the message; draws of two keys are independent.
        seed: Draws the images of each class.

    Returns:
        Positions, rising, int64 [size].

    Raises:
        DataError: Fewer than one of each class are asked for, or more than there are.
    """
    count = len(labels_N)
    if size is None or size == count:
        return torch.arange(count)
    if not classes <= size < count:
        raise DataError(f"{key} = {size} must be between {classes} (one of each class) and {count} (all).")
    have_K = labels_N.bincount(minlength=classes)
    # Water filling: the highest level L such that min(have_k, L) images of each class fit, then one more of the first.
    taken_L = have_K.minimum(torch.arange(int(have_K.max()) + 1)[:, None]).sum(1)
    level = int((taken_L <= size).nonzero().max())
    richer_K = have_K > level
    take_K = have_K.clamp(max=level) + (richer_K & (richer_K.cumsum(0) <= size - taken_L[level]))
    return _draw_per_class(labels_N, take_K, purpose_generator(seed, key))


def split_off_test(labels_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw positions of training and test images: a fraction of every class is tested, at least one of two and more."""
    have_K = labels_N.bincount()
    # A class of one image keeps it for training: nothing could be learnt of it else.
    take_K = (fraction * have_K).round().long().clamp(min=1).minimum((have_K - 1).clamp(min=0))
    test_N = _draw_per_class(labels_N, take_K, purpose_generator(seed, "test"))
    is_test_N = torch.zeros(len(labels_N), dtype=torch.bool).index_fill(0, test_N, True)
    return (~is_test_N).nonzero().flatten(), test_N


def hold_out(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw positions of the images that are trained on, and of those held out for validation, each rising."""
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    number = round(fraction * count)
    return order_N[number:].sort().values, order_N[:number].sort().values


def channel_statistics(split: AnySplit, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation per channel over a split's pixels, in units of [0, 1], to four decimals.

    Args:
        split: The images; of more than `SAMPLE` so many are looked at.
        seed: Draws those.
    """
    if len(split) > SAMPLE:
        split = split.take(torch.randperm(len(split), generator=purpose_generator(seed, "statistics"))[:SAMPLE])
    # Of histograms of the 256 values: exact, and no split has to be in memory at once.
    counts_CV = torch.zeros(3, 256, dtype=torch.int64)
    for images_NCHW in split.chunks(64):
        for channel in range(3):
            counts_CV[channel] += images_NCHW[:, channel].flatten().bincount(minlength=256)
    share_CV = counts_CV.double() / counts_CV.sum(1, keepdim=True)
    values_V = torch.arange(256, dtype=torch.float64) / 255
    mean_C = share_CV @ values_V
    std_C = (share_CV * (values_V - mean_C[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)  # of one flat colour: 0
    return tuple(round(value, 4) for value in mean_C.tolist()), tuple(round(value, 4) for value in std_C.tolist())


def _draw_per_class(labels_N: Tensor, take_K: Tensor, generator: torch.Generator) -> Tensor:
    """Draw positions of so many images of each class, rising."""
    drawn = []
    for label, take in enumerate(take_K.tolist()):
        index_N = (labels_N == label).nonzero().flatten()
        drawn.append(index_N[torch.randperm(len(index_N), generator=generator)[:take]])
    return torch.cat(drawn).sort().values

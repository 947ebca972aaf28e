"""Which images are left out, held out and tested on, by seed; and what the mean and deviation of the rest are.

Every purpose has a generator of its own: how many training images are used does not change which test images are.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from rkd_deploy.data.splits import AnySplit
from rkd_deploy.errors import DataError

SAMPLE = 2000
"""Images that mean and standard deviation are measured over, where there are more: enough for the third decimal."""


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and the purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def limited(labels_N: Tensor, limit: int | None, classes: int, key: str, seed: int) -> Tensor:
    """Positions of `limit` images, rising: the same number of every class, and what is over to the first classes.

    A class that has fewer gives all it has, and the others more.

    Raises:
        DataError: Fewer than one of each class are asked for, or more than there are.
    """
    count = len(labels_N)
    if limit is None or limit == count:
        return torch.arange(count)
    if not classes <= limit < count:
        raise DataError(f"{key} = {limit} must be between {classes} (one of each class) and {count} (all).")
    have_K = labels_N.bincount(minlength=classes)
    taken_L = have_K.minimum(torch.arange(int(have_K.max()) + 1)[:, None]).sum(1)  # by the most of each class
    level = int((taken_L <= limit).nonzero().max())
    richer_K = have_K > level
    share_K = have_K.clamp(max=level) + (richer_K & (richer_K.cumsum(0) <= limit - taken_L[level]))
    return _of_each_class(labels_N, share_K, generator_of(seed, key))


def test_share(labels_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of training and of test images: this fraction of every class, at least one of two and more."""
    have_K = labels_N.bincount()
    share_K = (fraction * have_K).round().long().clamp(min=1).minimum((have_K - 1).clamp(min=0))
    test_N = _of_each_class(labels_N, share_K, generator_of(seed, "test"))
    is_test_N = torch.zeros(len(labels_N), dtype=torch.bool).index_fill(0, test_N, True)
    return (~is_test_N).nonzero().flatten(), test_N


def held_out(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions that are trained on, and those held out, each rising."""
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    number = round(fraction * count)
    return order_N[number:].sort().values, order_N[:number].sort().values


def statistics(split: AnySplit, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation over pixels in units of [0, 1], to four decimals."""
    if len(split) > SAMPLE:
        split = split.take(torch.randperm(len(split), generator=generator_of(seed, "statistics"))[:SAMPLE])
    counts_CV = torch.zeros(3, 256, dtype=torch.int64)
    for images_NCHW in split.chunks(64):
        for channel in range(3):
            counts_CV[channel] += images_NCHW[:, channel].flatten().bincount(minlength=256)
    share_CV = counts_CV.double() / counts_CV.sum(1, keepdim=True)
    values_V = torch.arange(256, dtype=torch.float64) / 255
    mean_C = share_CV @ values_V
    std_C = (share_CV * (values_V - mean_C[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)  # of one flat colour: 0
    return tuple(round(value, 4) for value in mean_C.tolist()), tuple(round(value, 4) for value in std_C.tolist())


def _of_each_class(labels_N: Tensor, share_K: Tensor, generator: torch.Generator) -> Tensor:
    chosen = []
    for label, share in enumerate(share_K.tolist()):
        index_N = (labels_N == label).nonzero().flatten()
        chosen.append(index_N[torch.randperm(len(index_N), generator=generator)[:share]])
    return torch.cat(chosen).sort().values

"""Splits of labelled images, in memory or read from files when wanted, and how they are drawn by seed.

Both kinds give uint8 images of the size that networks see, by the rule that deployed models follow (`card.Preprocess`).
Every draw has a generator of its own: how many training images are used does not change which test images are.
Letters: N images, C = 3 channels (RGB), H height, W width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rkd_deploy.card import Preprocess
from rkd_deploy.data.files import ImageSource, map_in_threads, read_image
from rkd_deploy.errors import DataError
from rkd_deploy.images import Pixels, fitted

EVALUATED_AT_ONCE, _PIXELS_AT_ONCE = 500, 2**22


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split in memory: images uint8 [N, 3, H, W] and labels int64 [N]."""

    images_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.images_NCHW.shape[-2:]
        return height, width

    def take(self, positions_N: Tensor | npt.NDArray[np.int64]) -> Split:
        """The split of the images at some positions."""
        index_N = torch.as_tensor(positions_N)
        return Split(images_NCHW=self.images_NCHW[index_N], labels_N=self.labels_N[index_N])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [n, 3, H, W] with n <= size."""
        return iter(torch.split(self.images_NCHW, size))


@dataclass(frozen=True, kw_only=True)
class FileSplit:
    """A split in files, never all in memory.

    Attributes:
        source: The encoded images.
        index_N: Positions in the source of the images of this split, int64 [N].
        labels_N: Labels of these images, int64 [N].
        preprocess: How an image comes to the size that networks see.
        workers: Number of processes that read; 0: none.
    """

    source: ImageSource
    index_N: Tensor
    labels_N: Tensor
    preprocess: Preprocess
    workers: int

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.preprocess.height, self.preprocess.width

    def take(self, positions_N: Tensor | npt.NDArray[np.int64]) -> FileSplit:
        """The split of the images at some positions."""
        index_N = torch.as_tensor(positions_N)
        return replace(self, index_N=self.index_N[index_N], labels_N=self.labels_N[index_N])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [n, 3, H, W] with n <= size.

        Raises:
            DataError: One cannot be read.
        """
        if not len(self):
            return
        for batch in DataLoader(_Fitted(self), batch_size=size, num_workers=self.workers, collate_fn=collate):
            yield unwrap(batch)

    def fitted(self, position: int) -> Tensor:
        """Read one image as deployed models would see it, uint8 [3, H, W]."""
        image = read_image(self.source, int(self.index_N[position]))
        return as_tensor(fitted(image, self.preprocess))

    def in_memory(self, threads: int) -> tuple[Split, dict[int, str]]:
        """Decode the split; gives it without broken images, and what is wrong with each of those, by position."""
        height, width = self.image_size
        try:
            images_NCHW = torch.empty(len(self), 3, height, width, dtype=torch.uint8)
        except RuntimeError as error:  # PyTorch's word for memory that is not there
            raise DataError(
                f"{len(self):,} images of {width} x {height} pixels are {3 * len(self) * height * width:,} bytes, "
                'which this machine has not free. Stream them: data.cache = "off", or lower data.image_size.'
            ) from error

        def fill(position: int) -> str | None:
            try:
                images_NCHW[position] = self.fitted(position)
            except DataError as error:
                return str(error)
            return None

        reasons = list(map_in_threads(fill, range(len(self)), threads, "Decoded"))
        split = Split(images_NCHW=images_NCHW, labels_N=self.labels_N)
        broken = {int(self.index_N[place]): reason for place, reason in enumerate(reasons) if reason is not None}
        whole_N = torch.tensor([reason is None for reason in reasons]).nonzero().flatten()
        return split.take(whole_N) if broken else split, broken


AnySplit: TypeAlias = Split | FileSplit


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A data set as a recipe asks for it.

    Attributes:
        name: Name of the set in recipes.
        classes: Label names, in the order of the labels.
        mean: Mean per channel, in units of [0, 1].
        std: Standard deviation per channel, in units of [0, 1].
        train: Images that are learnt from.
        val: Images held out of the training images by seed; empty when the recipe says so.
        test: Images of the one evaluation at the end.
        crop_fraction: As in `card.Preprocess`: how a photo comes to the size of these images.
        sources: Where each split comes from, and how it is read, in words; for sets of files.
        skipped: Broken files that were left out, and what is wrong with each.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: AnySplit
    val: AnySplit
    test: AnySplit
    crop_fraction: float = 1.0
    sources: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.image_size


def as_tensor(pixels_HWC: Pixels) -> Tensor:
    """Convert pixels, uint8 [H, W, C] of NumPy, to a tensor [C, H, W]."""
    return torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1).contiguous()


class _Fitted(Dataset[Tensor | DataError]):
    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> Tensor | DataError:
        try:
            return self.split.fitted(position)
        except DataError as error:
            return error


def collate(images: Sequence[Tensor | DataError]) -> Tensor | DataError:
    """Stack images to a batch [n, 3, H, W], or give the error of the first that could not be read.

    An error raised in a worker process would arrive buried in its traceback; one handed over as a result does not.
    """
    whole = []
    for image in images:
        if isinstance(image, DataError):
            return image
        whole.append(image)
    return torch.stack(whole)


def unwrap(batch: Tensor | DataError) -> Tensor:
    """The batch that `collate` gave; where that was an error, it is raised."""
    if isinstance(batch, DataError):
        raise batch
    return batch


def on_device(split: AnySplit, device: torch.device) -> AnySplit:
    """Move a split in memory to a device; a split in files stays where it is."""
    if isinstance(split, FileSplit):
        return split
    return replace(split, images_NCHW=split.images_NCHW.to(device), labels_N=split.labels_N.to(device))


def evaluation_batch(image_size: tuple[int, int]) -> int:
    """Number of images to evaluate at once: 500, and fewer above 91 pixels (83 at 224), for the memory's sake."""
    height, width = image_size
    return max(1, min(EVALUATED_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))


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

"""Splits of labelled images: in memory as one tensor, or in files read when they are wanted.

Both give uint8 images of the size that networks see, by the rule that deployed models follow (`card.Preprocess`).
Letters: N images, C = 3 channels (RGB), H height, W width.
"""

from __future__ import annotations

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

"""Loads sets beyond memory: worker processes read, decode and augment image by image.

Augmentations are torchvision's, their random numbers those of (seed, epoch, image): an epoch is the same whatever the
number of workers, and a run resumed at any batch reads nothing of what came before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rkd_deploy.data.augment import Mixing
from rkd_deploy.data.batches import (
    EpochBatches,
    Normaliser,
    Share,
    generator_of_batch,
    generator_of_epoch,
    seeded_image,
)
from rkd_deploy.data.files import read_image
from rkd_deploy.data.splits import FileSplit, as_tensor, collate, unwrap
from rkd_deploy.errors import DataError
from rkd_deploy.images import fitted

_Key = tuple[int, int, int]
"""Seed, epoch and position in the split of an image: all that a worker needs to augment it."""


class StreamLoader:
    """Shuffled, augmented, normalised batches of images in files.

    Args:
        split: The images.
        normalise: uint8 batch to float batch, on its device.
        batch_size: B, of all processes; an epoch drops the images that do not fill a last batch.
        augmentations: Any of ``"resized_crop"`` or ``"crop"``, ``"flip"`` and ``"randaugment"``.
        crop_padding: Pixels of zeros on each side, for crop.
        randaugment: Number of operations, and their magnitude.
        mixing: What is done to the batch after that.
        seed: Together with the number of an epoch decides everything random in it.
        share: The part of every batch that this process takes.
    """

    def __init__(
        self,
        split: FileSplit,
        normalise: Normaliser,
        *,
        batch_size: int,
        augmentations: Sequence[str],
        crop_padding: int,
        randaugment: tuple[int, int],
        mixing: Mixing,
        seed: int,
        share: Share = Share(),  # noqa: B008 - frozen
    ) -> None:
        self._split, self._normalise, self._mixing, self._seed = split, normalise, mixing, seed
        self._batches = EpochBatches(len(split), batch_size, share, mixing.mixes)
        self._keys: list[list[_Key]] = []
        self._loader = DataLoader(
            _Augmented(split, _Augmentation(split, augmentations, crop_padding, randaugment)),
            batch_sampler=_Sampler(self._keys),
            num_workers=split.workers,
            collate_fn=collate,
            pin_memory=normalise.device.type == "cuda",
            # Workers live on from epoch to epoch: to start them takes seconds, each imports torch. Hence keys that hold
            # the epoch's number, and a sampler whose list is refilled in place.
            persistent_workers=split.workers > 0,
        )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self._batches)

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process."""
        return self._batches.size

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, as `batches.Loader.epoch` says.

        Raises:
            DataError: An image cannot be read; it could when the run began.
        """
        # The source shuffles: tar shards are read in runs, because a disk that seeks for every image does little else.
        order_N = self._split.source.shuffled(self._split.index_N, generator_of_epoch(self._seed, number))
        batches = [order_N[self._batches.positions(batch)] for batch in range(first_batch, len(self))]
        self._keys[:] = [[(self._seed, number, position) for position in index_N.tolist()] for index_N in batches]
        for batch, (index_N, images) in enumerate(zip(batches, self._loader, strict=True), first_batch):
            x_NCHW = self._normalise(unwrap(images))
            y_N = self._split.labels_N[index_N].to(x_NCHW.device, non_blocking=True)
            yield self._mixing(x_NCHW, y_N, generator_of_batch(self._seed, number, batch))


class _Sampler:
    """Gives the batches of the epoch in progress from a list that is filled anew, so that workers live on."""

    def __init__(self, keys: list[list[_Key]]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[list[_Key]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Augmented(Dataset[Tensor | DataError]):
    def __init__(self, split: FileSplit, augmentation: _Augmentation) -> None:
        self._split, self._augmentation = split, augmentation

    def __getitem__(self, key: _Key) -> Tensor | DataError:
        try:
            with seeded_image(*key):
                return self._augmentation(key[2])
        # Handed over as a result (`splits.collate`): raised here it would arrive inside of a worker's traceback.
        except DataError as error:
            return error


class _Augmentation:
    """Reads and augments one image of a split: uint8 [3, H, W]."""

    def __init__(
        self, split: FileSplit, augmentations: Sequence[str], padding: int, randaugment: tuple[int, int]
    ) -> None:
        size = split.image_size
        self._split = split
        self._window = v2.RandomResizedCrop(size, antialias=True) if "resized_crop" in augmentations else None
        steps = {
            "crop": v2.RandomCrop(size, padding),
            "flip": v2.RandomHorizontalFlip(),
            "randaugment": v2.RandAugment(*randaugment),
        }
        self._steps = [step for name, step in steps.items() if name in augmentations]

    def __call__(self, position: int) -> Tensor:
        split = self._split
        photo = read_image(split.source, int(split.index_N[position]))
        if self._window is not None:
            # On the decoded photo, before it is resized: a window of the resized image would be enlarged pixels.
            image = v2.functional.pil_to_tensor(self._window(photo))
        else:
            image = as_tensor(fitted(photo, split.preprocess))
        for step in self._steps:
            image = step(image)
        assert isinstance(image, torch.Tensor)
        return image

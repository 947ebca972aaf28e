"""Loads sets in the device's memory: no workers, no copies, a whole batch augmented at once.

What epoch e gives depends only on (seed, e): a run can be resumed at any batch and sees what it would have seen.
`train_loader` chooses between this one and that for images in files (`streaming.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from rkd_deploy.data import augment
from rkd_deploy.data.augment import Mixing
from rkd_deploy.data.batches import (
    EpochBatches,
    Loader,
    Normaliser,
    Share,
    generator_of_batch,
    generator_of_epoch,
    seeded_image,
)
from rkd_deploy.data.splits import AnySplit, FileSplit, Split
from rkd_deploy.data.streaming import StreamLoader
from rkd_deploy.recipe import DataRecipe

__all__ = ["DeviceLoader", "Loader", "Normaliser", "Share", "train_loader"]

_ONE_PROCESS = Share()
_NO_MIXING = Mixing(classes=0)


def train_loader(
    recipe: DataRecipe,
    split: AnySplit,
    normalise: Normaliser,
    *,
    classes: int,
    batch_size: int,
    seed: int,
    share: Share = _ONE_PROCESS,
) -> Loader:
    """Make the loader of a training split.

    Args:
        recipe: Says what is done to the images.
        split: From `load_images`, on the device if it is in memory.
        normalise: uint8 batch to float batch.
        classes: Number of classes K.
        batch_size: Images in a batch of all processes together.
        seed: Decides, with the number of an epoch, everything random in it.
        share: The part of every batch that this process takes.

    Raises:
        RecipeError: The batch cannot be divided among the processes.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "augmentations": recipe.augmentations,
        "crop_padding": recipe.crop_padding,
        "randaugment": (recipe.randaugment_ops, recipe.randaugment_magnitude),
        "mixing": Mixing(
            classes=classes, mixup=recipe.mixup, cutmix=recipe.cutmix, label_smoothing=recipe.label_smoothing
        ),
        "seed": seed,
        "share": share,
    }
    if isinstance(split, FileSplit):
        return StreamLoader(split, normalise, **settings)
    return DeviceLoader(split, normalise, **settings)


class DeviceLoader:
    """Shuffled, augmented, normalised batches of images that are on the device already.

    Args:
        split: The images; moved nowhere.
        normalise: uint8 batch to float batch.
        batch_size: B, of all processes; an epoch drops the images that do not fill a last batch.
        augmentations: Any of ``"resized_crop"`` or ``"crop"``, ``"flip"``, and ``"randaugment"``; the last is
            torchvision's, image by image, and therefore slow.
        crop_padding: Pixels of zeros on each side, for crop.
        seed: Together with the number of an epoch decides everything random in it.
        randaugment: Number of operations, and their magnitude.
        mixing: What is done to the batch after that.
        share: The part of every batch that this process takes.
    """

    def __init__(
        self,
        split: Split,
        normalise: Normaliser,
        *,
        batch_size: int,
        augmentations: Sequence[str],
        crop_padding: int,
        seed: int,
        randaugment: tuple[int, int] = (2, 10),
        mixing: Mixing = _NO_MIXING,
        share: Share = _ONE_PROCESS,
    ) -> None:
        self._labels_N, self._normalise, self._mixing, self._seed = split.labels_N, normalise, mixing, seed
        self._batches = EpochBatches(len(split), batch_size, share, mixing.mixes)
        self._flips = "flip" in augmentations
        self._resizes = "resized_crop" in augmentations
        self._randaugment = v2.RandAugment(*randaugment) if "randaugment" in augmentations else None
        self._padding = crop_padding if "crop" in augmentations else 0
        self._size = split.image_size
        self._images_NCHW = augment.pad(split.images_NCHW, self._padding) if self._padding else split.images_NCHW

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self._batches)

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process."""
        return self._batches.size

    @property
    def on_device_alone(self) -> bool:
        """Whether a batch is made by the device alone, from `draws`: then a CUDA graph can record how."""
        return self._randaugment is None and not self._mixing.mixes

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, as `batches.Loader.epoch` says."""
        draws_DN = self.draws(number)
        for batch in range(first_batch, len(self)):
            draws_DB = draws_DN[:, self._batches.positions(batch).to(draws_DN.device)]
            images_NCHW = self._augmented(draws_DB)
            if self._randaugment is not None:
                images_NCHW = self._randaugmented(images_NCHW, number, draws_DB[0])
            x_NCHW, y_N = self._normalise(images_NCHW), self._labels_N[draws_DB[0]]
            yield self._mixing(x_NCHW, y_N, generator_of_batch(self._seed, number, batch))

    def draws(self, number: int) -> Tensor:
        """All random numbers of an epoch, int64 [D, N] on the device, by place in the order of the epoch.

        The rows are the image; whether it is flipped; first row and column of its crop; top, left, height and width of
        its resized crop. Only those that the augmentations need are there.
        """
        count, device = len(self._labels_N), self._labels_N.device
        generator = generator_of_epoch(self._seed, number)
        # All of an epoch's numbers at once and in this order, wherever the epoch is resumed.
        order_N = torch.randperm(count, generator=generator)
        offsets_2N = torch.randint(0, 2 * self._padding + 1, (2, count), generator=generator)
        flips_N = torch.rand(count, generator=generator) < 0.5
        rows = [order_N[None], flips_N[None].long(), *([offsets_2N] if self._padding else [])]
        if self._resizes:
            rows.append(augment.draw_windows(count, self._size, generator))
        return torch.cat(rows).to(device)

    def draws_by_batch(self, number: int) -> Tensor:
        """The `draws` of an epoch, batch after batch, int64 [batches, D, B]."""
        draws_DN = self.draws(number)
        positions_SB = torch.stack([self._batches.positions(batch) for batch in range(len(self))])
        return draws_DN[:, positions_SB.to(draws_DN.device)].transpose(0, 1).contiguous()

    def batch(self, draws_DB: Tensor) -> tuple[Tensor, Tensor]:
        """A batch from its `draws`, as `epoch` gives it; only where `on_device_alone`."""
        x_NCHW, y_N = self._normalise(self._augmented(draws_DB)), self._labels_N[draws_DB[0]]
        return self._mixing(x_NCHW, y_N, generator_of_batch(self._seed, 0, 0))  # draws nothing where nothing mixes

    def _augmented(self, draws_DB: Tensor) -> Tensor:
        """The images that are drawn, cropped and flipped, uint8."""
        index_N, flips_N, *others = draws_DB
        if self._padding:
            top_N, left_N = others[:2]
            images_NCHW = augment.crop(self._images_NCHW, index_N, top_N, left_N, self._size)
        else:
            images_NCHW = self._images_NCHW[index_N]
        if self._resizes:
            images_NCHW = augment.resized_crop(images_NCHW, draws_DB[-4:])
        return augment.flip(images_NCHW, flips_N) if self._flips else images_NCHW

    def _randaugmented(self, images_NCHW: Tensor, epoch: int, index_N: Tensor) -> Tensor:
        assert self._randaugment is not None
        augmented = []
        for image_CHW, index in zip(images_NCHW, index_N.tolist(), strict=True):
            with seeded_image(self._seed, epoch, index):
                augmented.append(self._randaugment(image_CHW))
        return torch.stack(augmented)

"""Data sets small enough to live in memory, as uint8 tensors with a validation split.

The test images are handed out apart from the others and are meant to be used once, at the end.
Letters: N images, C = 3 channels (RGB), H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkd_deploy.errors import DataError, require
from rkd_deploy.recipe import DataRecipe

DEFAULT_ROOT = Path(".data")

# Of the training images, in units of [0, 1].
_NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.305, 0.305, 0.305), (0.318, 0.318, 0.318)),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images uint8 [N, 3, H, W] and labels int64 [N]."""

    images_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, index_N: Tensor) -> Split:
        """The images at these positions."""
        return Split(images_NCHW=self.images_NCHW[index_N], labels_N=self.labels_N[index_N])


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A data set as a recipe asks for it.

    Attributes:
        name: Its name in recipes.
        classes: Label names, in the order of the labels.
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        train: What is learnt from.
        val: Held out of the training images by seed; empty when the recipe says so.
        test: For the one evaluation at the end.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.train.images_NCHW.shape[-2:]
        return height, width


def load_images(recipe: DataRecipe, seed: int) -> ImageSet:
    """Read a data set, draw its subsets and hold out its validation images.

    Args:
        recipe: Table `[data]`.
        seed: Decides which images are held out or left out.

    Raises:
        DataError: The data are not there and cannot be downloaded, are damaged, or are fewer than asked for.
    """
    train, test, classes = _digits(recipe.image_size or 16) if recipe.name == "digits" else _cifar(recipe)
    mean, std = _NORMALISATION[recipe.name]
    generator = torch.Generator().manual_seed(seed)
    train = _limited(train, recipe.train_limit, len(classes), "data.train_limit", generator)
    test = _limited(test, recipe.test_limit, len(classes), "data.test_limit", generator)
    order = torch.randperm(len(train), generator=generator)
    held_out = round(recipe.val_fraction * len(train))
    return ImageSet(
        name=recipe.name,
        classes=classes,
        mean=recipe.mean or mean,
        std=recipe.std or std,
        train=train.take(order[held_out:].sort().values),
        val=train.take(order[:held_out].sort().values),
        test=test,
    )


def _limited(split: Split, limit: int | None, classes: int, key: str, generator: torch.Generator) -> Split:
    """The same number of images of every class, drawn at random; the remainder goes to the first classes."""
    if limit is None or limit == len(split):
        return split
    if not classes <= limit < len(split):
        raise DataError(f"{key} = {limit} must be between {classes} (one of each class) and {len(split)} (all).")
    chosen = []
    for label in range(classes):
        index_N = (split.labels_N == label).nonzero().flatten()
        share = limit // classes + (label < limit % classes)
        chosen.append(index_N[torch.randperm(len(index_N), generator=generator)[:share]])
    return split.take(torch.cat(chosen).sort().values)


def _digits(size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """The 1,797 handwritten digits of scikit-learn (UCI, 8x8 grey), as RGB at `size` pixels; a fifth is the test split.

    The file goes writer by writer, so a split by position tests on hands that were mostly not trained on.
    """
    bunch = require("sklearn.datasets", "train").load_digits()
    grey_N1HW = torch.from_numpy(bunch.images).float().mul_(255 / 16).unsqueeze(1)
    resized = torch.nn.functional.interpolate(grey_N1HW, size=(size, size), mode="bilinear", align_corners=False)
    images_NCHW = resized.round_().clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels_N = torch.from_numpy(bunch.target).long()
    first_test = len(labels_N) - len(labels_N) // 5
    train = Split(images_NCHW=images_NCHW[:first_test], labels_N=labels_N[:first_test])
    test = Split(images_NCHW=images_NCHW[first_test:], labels_N=labels_N[first_test:])
    return train, test, tuple(str(digit) for digit in range(10))


def _cifar(recipe: DataRecipe) -> tuple[Split, Split, tuple[str, ...]]:
    """CIFAR-10 or CIFAR-100 through torchvision: read where it lies, downloaded where it does not."""
    datasets = require("torchvision.datasets", "train")
    owner = datasets.CIFAR100 if recipe.name == "cifar100" else datasets.CIFAR10
    root = DEFAULT_ROOT if recipe.root is None else Path(recipe.root)
    try:
        train, test = (_open_cifar(owner, root, train=train) for train in (True, False))
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"{recipe.name} is not whole in {root / owner.base_folder} and could not be downloaded from {owner.url} "
            f"({error}). Unpack it yourself and name the folder that holds {owner.base_folder}/: --set data.root=FOLDER"
        ) from error
    return _split(train), _split(test), tuple(train.classes)


def _open_cifar(owner: Any, root: Path, train: bool) -> Any:
    try:
        return owner(root, train=train, download=False)  # checks the MD5 of every file before it reads one
    except RuntimeError:
        return owner(root, train=train, download=True)


def _split(dataset: Any) -> Split:
    return Split(
        images_NCHW=torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(),
        labels_N=torch.tensor(dataset.targets),
    )


def on_device(split: Split, device: torch.device) -> Split:
    """The same images in the memory of a device."""
    return replace(split, images_NCHW=split.images_NCHW.to(device), labels_N=split.labels_N.to(device))

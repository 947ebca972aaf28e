"""Data sets by name: those that come as arrays, here, and those of image files, in `filesets.py`.

The test images are handed out apart from the others and are meant to be used once, at the end.
"""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from rkd_deploy.data.drawing import held_out, limited
from rkd_deploy.data.filesets import load_files
from rkd_deploy.data.splits import AnySplit, FileSplit, ImageSet, Split, on_device
from rkd_deploy.errors import DataError, require
from rkd_deploy.recipe import DataRecipe

__all__ = ["AnySplit", "FileSplit", "ImageSet", "Split", "load_images", "on_device"]

DEFAULT_ROOT = Path(".data")

# Of the training images, in units of [0, 1]; of digits at 16 pixels (at 8 their deviation is 0.375, at 12 0.321).
_NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.305, 0.305, 0.305), (0.318, 0.318, 0.318)),
}


def load_images(recipe: DataRecipe, seed: int) -> ImageSet:
    """Read a data set, draw its subsets and hold out its validation images.

    Args:
        recipe: Table `[data]`.
        seed: Decides which images are held out or left out.

    Raises:
        DataError: The data are not there and cannot be downloaded, are damaged, or are fewer than asked for.
        RecipeError: A key that the files have no use for.
    """
    if recipe.of_files:
        return load_files(recipe, seed, DEFAULT_ROOT)
    train, test, classes = _digits(recipe.image_size or 16) if recipe.name == "digits" else _cifar(recipe)
    mean, std = _NORMALISATION[recipe.name]
    train = train.take(limited(train.labels_N, recipe.train_limit, len(classes), "data.train_limit", seed))
    test = test.take(limited(test.labels_N, recipe.test_limit, len(classes), "data.test_limit", seed))
    train_N, val_N = held_out(len(train), recipe.val_fraction, seed)
    return ImageSet(
        name=recipe.name,
        classes=classes,
        mean=recipe.mean or mean,
        std=recipe.std or std,
        train=train.take(train_N),
        val=train.take(val_N),
        test=test,
    )


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

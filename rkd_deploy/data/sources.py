"""Reads data sets as a recipe asks for them: found, split by seed, decoded or streamed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkd_deploy.card import Preprocess, unlistable
from rkd_deploy.data.files import find_broken, refuse_broken, remember_broken
from rkd_deploy.data.folders import LabelledImages, SplitsOnDisk, scan_folder, scan_imagenet
from rkd_deploy.data.shards import scan_shards
from rkd_deploy.data.splits import (
    AnySplit,
    FileSplit,
    ImageSet,
    Split,
    channel_statistics,
    hold_out,
    limit,
    on_device,
    split_off_test,
)
from rkd_deploy.errors import DataError, RecipeError, require
from rkd_deploy.image_folders import left_out_in_words
from rkd_deploy.recipe import DataRecipe

__all__ = ["AnySplit", "FileSplit", "ImageSet", "Split", "load_images", "on_device"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that published ImageNet weights are trained with."""

DATA_ROOT = Path(".data")
"""Folder that CIFAR is downloaded into, and that holds the caches of what was learnt of files."""

_SIDE, _TEST_FRACTION = 224, 0.2
_Drawn = dict[str, tuple[LabelledImages, Tensor]]
"""Images on disk and the positions, int64 [N], of those that belong to a split, by the split's name."""


def load_files(recipe: DataRecipe, seed: int, memory: Path) -> ImageSet:
    """Find the images, draw the splits, and read what fits.

    Args:
        recipe: Table `[data]` of an imagefolder, imagenet or webdataset.
        seed: Decides which images are held out or left out.
        memory: Folder where indexes and lists of broken files are kept.

    Raises:
        DataError: Images missing, or broken and not to be skipped, or fewer than asked for.
        RecipeError: A key that these files have no use for.
    """
    on_disk, broken = _scan(recipe, memory)
    if fault := unlistable(on_disk.classes):
        raise DataError(f"{fault} Rename its folder.")
    drawn, sources = _draw(recipe, on_disk, seed)
    workers = min(8, os.cpu_count() or 1) if recipe.workers is None else recipe.workers
    preprocess = _preprocess(recipe)
    splits: dict[str, AnySplit] = {}
    total = sum(len(index_N) for _, index_N in drawn.values()) + len(broken)
    decode = _in_memory(recipe, total)
    for name, (labelled, index_N) in drawn.items():
        files = FileSplit(
            source=labelled.source,
            index_N=index_N,
            labels_N=labelled.labels_N[index_N],
            preprocess=preprocess,
            workers=workers,
        )
        splits[name], reasons = _decoded(files, workers, memory) if decode else _checked(files, workers, memory)
        broken = broken + list(reasons.values())
    refuse_broken(broken, total, recipe.broken)
    _check_enough(splits, on_disk.classes, len(on_disk.splits["train"].labels_N), len(broken))
    mean, std = _normalisation(recipe, splits["train"], seed)
    sources["reading"] = "decoded once into memory" if decode else "streamed"
    if on_disk.left_out:
        sources["left out"] = left_out_in_words(on_disk.left_out)
    return ImageSet(
        name=recipe.name,
        classes=on_disk.classes,
        mean=mean,
        std=std,
        crop_fraction=preprocess.crop_fraction,
        sources=sources,
        skipped=tuple(broken),
        **splits,
    )


def _scan(recipe: DataRecipe, memory: Path) -> tuple[SplitsOnDisk, list[str]]:
    assert recipe.root is not None
    if recipe.name == "webdataset":
        return scan_shards(recipe.root, recipe.test_root, memory)
    scan = scan_imagenet if recipe.name == "imagenet" else scan_folder
    return scan(Path(recipe.root)), []


def _draw(recipe: DataRecipe, on_disk: SplitsOnDisk, seed: int) -> tuple[_Drawn, dict[str, str]]:
    """Draw the images of each split; gives them, and in words where they come from."""
    train, classes = on_disk.splits["train"], len(on_disk.classes)
    sources = {"train": on_disk.origins["train"]}
    if "test" in on_disk.splits:
        # Without data.test_limit nothing is drawn for testing.
        unread = ("test_fraction", "split_seed") if recipe.test_limit is None else ("test_fraction",)
        for key in unread:
            if (value := getattr(recipe, key)) is not None:
                raise RecipeError(
                    f"data.{key} = {value} has no effect: the test split is {on_disk.origins['test']} of "
                    f"{recipe.root}. Leave it out."
                )
        train_N, (test, test_N) = torch.arange(len(train.labels_N)), (on_disk.splits["test"], None)
        sources["test"] = on_disk.origins["test"]
    else:
        fraction, split_seed = recipe.test_fraction or _TEST_FRACTION, recipe.split_seed or 0
        (train_N, test_N), test = split_off_test(train.labels_N, fraction, split_seed), train
        sources["test"] = f"{fraction:g} of every class, drawn with data.split_seed = {split_seed}"
    if test_N is None:
        test_N = torch.arange(len(test.labels_N))
    train_N = train_N[limit(train.labels_N[train_N], recipe.train_limit, classes, "data.train_limit", seed)]
    test_N = test_N[limit(test.labels_N[test_N], recipe.test_limit, classes, "data.test_limit", recipe.split_seed or 0)]
    if "val" in on_disk.splits:  # given: nothing is held out of train
        val, sources["val"] = on_disk.splits["val"], on_disk.origins["val"]
        drawn = {"train": (train, train_N), "val": (val, torch.arange(len(val.labels_N)))}
    else:
        rest_N, out_N = hold_out(len(train_N), recipe.val_fraction, seed)
        sources["val"] = f"{recipe.val_fraction:g} of train, held out with train.seed = {seed}"
        drawn = {"train": (train, train_N[rest_N]), "val": (train, train_N[out_N])}
    return drawn | {"test": (test, test_N)}, sources


def _preprocess(recipe: DataRecipe) -> Preprocess:
    """The way from a file to the pixels that networks see; normalisation is another step."""
    side = recipe.image_size or _SIDE
    fraction = recipe.crop_fraction or (0.875 if recipe.name == "imagenet" else 1.0)
    return Preprocess(height=side, width=side, mean=(0.0,) * 3, std=(1.0,) * 3, crop_fraction=fraction)


def _in_memory(recipe: DataRecipe, images: int) -> bool:
    side = recipe.image_size or _SIDE
    return recipe.cache == "memory" or (recipe.cache == "auto" and images * 3 * side**2 <= recipe.cache_gb * 1e9)


def _decoded(split: FileSplit, threads: int, memory: Path) -> tuple[AnySplit, dict[int, str]]:
    """Decode a split into memory without its broken images; gives it, and what is wrong with those."""
    whole, broken = split.in_memory(threads)
    remember_broken(split.source, split.index_N.tolist(), broken, memory)
    return whole, broken


def _checked(split: FileSplit, threads: int, memory: Path) -> tuple[AnySplit, dict[int, str]]:
    """Leave the broken images out of a split in files; gives it, and what is wrong with those."""
    positions = split.index_N.tolist()
    broken = find_broken(split.source, positions, threads, memory)
    whole_N = torch.tensor([position not in broken for position in positions]).nonzero().flatten()
    return split.take(whole_N) if broken else split, broken


def _check_enough(splits: Mapping[str, AnySplit], classes: Sequence[str], images: int, broken: int) -> None:
    """Refuse a set that is too small before anything is trained on it."""
    train = splits["train"]
    have_K = train.labels_N.bincount(minlength=len(classes))
    if missing := [name for name, count in zip(classes, have_K.tolist(), strict=True) if not count]:
        raise DataError(
            f"No training image is left of {len(missing)} of {len(classes)} classes ({', '.join(missing[:5])}), once "
            "broken, tested and held-out ones are taken away. Add images of them, or lower data.val_fraction."
        )
    if not len(splits["test"]):
        raise DataError(
            f"No image is left to test on: {images} images of {len(classes)} classes"
            f"{f', {broken} broken ones' if broken else ''}, and a class with one image keeps it for training. "
            "Add images, so that a class has at least two, or a test/ folder."
        )


def _normalisation(recipe: DataRecipe, train: AnySplit, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if recipe.mean and recipe.std:
        return recipe.mean, recipe.std
    as_imagenet = recipe.normalisation == "imagenet" or (recipe.name == "imagenet" and recipe.normalisation is None)
    mean, std = IMAGENET if as_imagenet else channel_statistics(train, seed)
    return recipe.mean or mean, recipe.std or std


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
        return load_files(recipe, seed, DATA_ROOT)
    train, test, classes = _digits(recipe.image_size or 16) if recipe.name == "digits" else _cifar(recipe)
    mean, std = IMAGENET if recipe.normalisation == "imagenet" else _NORMALISATION[recipe.name]
    train = train.take(limit(train.labels_N, recipe.train_limit, len(classes), "data.train_limit", seed))
    test = test.take(limit(test.labels_N, recipe.test_limit, len(classes), "data.test_limit", recipe.split_seed or 0))
    train_N, val_N = hold_out(len(train), recipe.val_fraction, seed)
    learnt, held_out = train.take(train_N), train.take(val_N)
    _check_enough({"train": learnt, "test": test}, classes, len(train), 0)
    return ImageSet(
        name=recipe.name,
        classes=classes,
        mean=recipe.mean or mean,
        std=recipe.std or std,
        train=learnt,
        val=held_out,
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
    root = DATA_ROOT if recipe.root is None else Path(recipe.root)
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

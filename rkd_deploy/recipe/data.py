"""Table `[data]` of a recipe: which images, and what is done to them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe.rules import LARGEST_DEVIATION, ReadWhere, check_keys, in_range, key, three_channels

IN_MEMORY = ("digits", "cifar10", "cifar100")
FILES = ("imagefolder", "imagenet", "webdataset")
"""Sets of image files of any size: decoded once into memory where they fit, else streamed."""
AUGMENTATIONS = ("crop", "resized_crop", "flip", "randaugment")

_MOST_IMAGES = 2**31 - 1
_LARGEST_SIDE = 4096
_LARGEST_DIGITS = 256
"""Side of the largest digits in pixels: they are drawn from 8 x 8, and all of them are in memory."""

_FOLDER = ReadWhere("with sets that lie in a folder: digits are in scikit-learn", lambda data: data.name != "digits")
_FILES = ReadWhere('with data.name = "imagefolder", "imagenet" or "webdataset"', lambda data: data.of_files)
_CACHE = ReadWhere(f'{_FILES.words} and data.cache = "auto"', lambda data: data.of_files and data.cache == "auto")
_SHARDS = ReadWhere('with data.name = "webdataset"', lambda data: data.name == "webdataset")
_ANY_SIZE = ReadWhere(
    "with sets whose images have no size of their own: CIFAR's are 32 pixels wide",
    lambda data: data.name not in ("cifar10", "cifar100"),
)
_SPLIT = ReadWhere('with data.name = "imagefolder" or "webdataset"', lambda data: data.splits_test)
_DRAWN = ReadWhere(
    f"{_SPLIT.words}, or with data.test_limit", lambda data: data.splits_test or data.test_limit is not None
)
_RANDAUGMENT = ReadWhere('with "randaugment" in data.augment', lambda data: "randaugment" in data.augmentations)


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Table `[data]`: which images, and what is done to them; a key that the set does not read keeps its default."""

    name: str = key("digits", choices=(*IN_MEMORY, *FILES))
    """digits (in scikit-learn, no download), cifar10, cifar100; imagefolder (any folder of class folders), imagenet
    (its layout and protocol), webdataset (tar shards)."""
    root: str | None = key(None, read=_FOLDER)
    """Folder that holds the data set: in torchvision's layout for CIFAR, downloaded into when it lacks it (default:
    .data); ROOT/train/CLASS and ROOT/val/CLASS (or valid, test), or ROOT/CLASS; shards, or their brace pattern."""
    test_root: str | None = key(None, read=_SHARDS)
    """Folder or brace pattern of the test shards. Default: ROOT/val or ROOT/test, else a share of all images."""
    image_size: int | None = key(None, low=1, high=_LARGEST_SIDE, read=_ANY_SIZE)
    """Side in pixels of what the networks see. Default: 16 for digits, 224 for files. CIFAR keeps its own 32."""
    crop_fraction: float | None = key(None, low=0.1, high=1, read=_FILES)
    """Outside training the shorter side is resized to image_size / crop_fraction and the centre cropped, as the
    exported model does. Default: 0.875 for imagenet (256, then 224), else 1."""
    train_limit: int | None = key(None, low=1, high=_MOST_IMAGES)
    """Use only so many training images, as evenly over the classes as they allow, drawn by seed."""
    test_limit: int | None = key(None, low=1, high=_MOST_IMAGES)
    """Use only so many test images, as evenly over the classes as they allow, drawn by split_seed."""
    val_fraction: float = key(0.1, low=0, high=0.5)
    """Share of the training images held out by seed; 0 trains on all of them, as the published protocol does."""
    test_fraction: float | None = key(None, low=0.01, high=0.9, read=_SPLIT)
    """Share of every class that is the test split, where the files have none. Default: 0.2"""
    split_seed: int | None = key(None, low=0, high=2**31 - 1, read=_DRAWN)
    """Draws that test split, and the images of test_limit, whatever train.seed is: runs of several seeds are judged on
    the same images, and no teacher of another seed has seen them. Default: 0"""
    augment: tuple[str, ...] | None = key(None, choices=AUGMENTATIONS)
    """Any of crop (zero padding, random position) or resized_crop (random area and aspect), flip (left to right) and
    randaugment. Default: crop and flip; for files resized_crop and flip."""
    crop_padding: int = key(4, low=0, high=16)
    """Pixels of padding on each side for crop."""
    randaugment_ops: int = key(2, low=1, high=16, read=_RANDAUGMENT)
    """Operations that randaugment applies to an image."""
    randaugment_magnitude: int = key(10, low=0, high=30, read=_RANDAUGMENT)
    """Magnitude of randaugment's operations."""
    mixup: float = key(0.0, low=0, high=100)
    """alpha of mixup (Zhang et al. 2018): each batch is mixed with itself by lambda ~ Beta(alpha, alpha). 0: off."""
    cutmix: float = key(0.0, low=0, high=100)
    """alpha of cutmix (Yun et al. 2019): a box is pasted instead. With mixup, a fair coin decides for each batch."""
    label_smoothing: float = key(0.0, low=0, high=0.9)
    """epsilon: targets are (1 - epsilon) for the class and epsilon / K more for each of the K (Szegedy et al. 2016)."""
    mean: tuple[float, ...] | None = key(None, low=-LARGEST_DEVIATION, high=LARGEST_DEVIATION)
    """Per-channel mean in units of [0, 1]. Default: that of the data set, as `normalisation` says."""
    std: tuple[float, ...] | None = key(None, low=1 / LARGEST_DEVIATION, high=LARGEST_DEVIATION)
    """Per-channel standard deviation in units of [0, 1]."""
    normalisation: str | None = key(None, choices=("data", "imagenet", "teacher"))
    """data: known or measured over the training images. imagenet: that of ImageNet. teacher: what teacher.mean/std,
    T's weights file or its published weights state. Default: that of published weights (teacher.pretrained, else
    student.pretrained), else data."""
    cache: str = key("auto", choices=("auto", "memory", "off"), read=_FILES)
    """memory: decode all files once, at image_size. off: stream them. auto: memory, if they fit into cache_gb."""
    cache_gb: float = key(2.0, low=0, read=_CACHE)
    """GB of decoded images that auto keeps in memory."""
    workers: int | None = key(None, low=0, high=256, read=_FILES)
    """Processes (threads, where all is decoded at once) that read files; 0: none. Default: the cores, at most 8."""
    broken: str = key("stop", choices=("stop", "skip"), read=_FILES)
    """stop: files that cannot be read are listed, and nothing is trained. skip: they are left out, and counted."""

    def __post_init__(self) -> None:
        test_root = "" if self.test_root is None else " and data.test_root"
        check_keys("data", self, f'data.name = "{self.name}"{test_root}')
        three_channels("data", self.mean, self.std)
        self._check_together()

    @property
    def folder_name(self) -> str:
        """What the folder of a set of files is called, fit for a run's name; empty where there is none."""
        place, brace, _ = (self.root or "").partition("{")
        if not self.of_files or not place:
            return ""
        try:
            place = os.path.abspath(os.path.dirname(place) if brace else place)
        except OSError:  # the current folder is gone
            return ""
        return "".join(sign for sign in os.path.basename(place)[:60] if sign.isprintable() and sign != "\\")

    @property
    def of_files(self) -> bool:
        """Whether the images are files of any size."""
        return self.name in FILES

    @property
    def augmentations(self) -> tuple[str, ...]:
        """What is done to training images, defaults resolved."""
        if self.augment is not None:
            return self.augment
        return ("resized_crop", "flip") if self.of_files else ("crop", "flip")

    @property
    def splits_test(self) -> bool:
        """Whether the test split is a share of all images, because the set comes without one."""
        return self.name in ("imagefolder", "webdataset") and self.test_root is None

    def _check_together(self) -> None:
        if self.of_files and self.root is None:
            raise RecipeError(
                f'data.name = "{self.name}" needs data.root, where the images are: --set data.root=FOLDER'
            )
        if {"crop", "resized_crop"} <= set(self.augmentations):
            raise RecipeError(
                f"data.augment = {list(self.augmentations)}: crop and resized_crop both choose the window. Keep one."
            )
        if self.normalisation in ("teacher", "imagenet") and (self.mean or self.std):
            raise RecipeError(
                f'data.mean and data.std go before data.normalisation = "{self.normalisation}". Leave one of them out.'
            )
        if self.name == "digits" and self.image_size is not None:
            in_range("data.image_size", self.image_size, 1, _LARGEST_DIGITS)

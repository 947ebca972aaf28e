"""Table `[data]` of a recipe, and which of its keys goes with which. Standard library only."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe.rules import MOST, check_types, choice, in_range, normalisation, toml_value

IN_MEMORY = ("digits", "cifar10", "cifar100")
FILES = ("imagefolder", "imagenet", "webdataset")
"""Sets of image files of any size: decoded once into memory where they fit, else streamed."""
AUGMENTATIONS = ("crop", "resized_crop", "flip", "randaugment")

_MOST_IMAGES = 2**31 - 1
_LARGEST_SIDE = 2**15
LARGEST_DIGITS = 256
"""Side of the largest digits in pixels: they are drawn from 8 x 8, and all of them are in memory."""

_WITH_FILES = 'with data.name = "imagefolder", "imagenet" or "webdataset"'
_READ_WHERE = {
    "test_root": 'with data.name = "webdataset"',
    "image_size": "with sets whose images have no size of their own: CIFAR's are 32 pixels wide",
    "crop_fraction": _WITH_FILES,
    "test_fraction": 'with data.name = "imagefolder" or "webdataset"',
    "split_seed": 'with data.name = "imagefolder" or "webdataset", or with data.test_limit',
    **dict.fromkeys(("randaugment_ops", "randaugment_magnitude"), 'with "randaugment" in data.augment'),
    **dict.fromkeys(("cache", "workers", "broken"), _WITH_FILES),
    "cache_gb": f'{_WITH_FILES} and data.cache = "auto"',
}


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Table `[data]`: which images, and what is done to them. A key that the set has no use for keeps its default."""

    name: str = "digits"
    """digits (in scikit-learn, no download), cifar10, cifar100; imagefolder (any folder of class folders), imagenet
    (its layout and protocol), webdataset (tar shards)."""
    root: str | None = None
    """Folder that holds the data set: in torchvision's layout for CIFAR, downloaded into when it lacks it (default:
    .data); ROOT/train/CLASS and ROOT/val/CLASS (or valid, test), or ROOT/CLASS; shards, or their brace pattern."""
    test_root: str | None = None
    """Folder or brace pattern of the test shards. Default: ROOT/val or ROOT/test, else a share of all images."""
    image_size: int | None = None
    """Side in pixels of what the networks see. Default: 16 for digits, 224 for files. CIFAR keeps its own 32."""
    crop_fraction: float | None = None
    """Outside training the shorter side is resized to image_size / crop_fraction and the centre cropped, as the
    exported model does. Default: 0.875 for imagenet (256, then 224), else 1."""
    train_limit: int | None = None
    """Use only so many training images, as evenly over the classes as they allow, drawn by seed."""
    test_limit: int | None = None
    """Use only so many test images, as evenly over the classes as they allow, drawn by split_seed."""
    val_fraction: float = 0.1
    """Share of the training images held out by seed; 0 trains on all of them, as the published protocol does."""
    test_fraction: float | None = None
    """Share of every class that is the test split, where the files have none. Default: 0.2"""
    split_seed: int | None = None
    """Draws that test split, and the images of test_limit, whatever train.seed is: runs of several seeds are judged on
    the same images, and no teacher of another seed has seen them. Default: 0"""
    augment: tuple[str, ...] | None = None
    """Any of crop (zero padding, random position) or resized_crop (random area and aspect), flip (left to right) and
    randaugment. Default: crop and flip; for files resized_crop and flip."""
    crop_padding: int = 4
    """Pixels of padding on each side for crop."""
    randaugment_ops: int = 2
    """Operations that randaugment applies to an image."""
    randaugment_magnitude: int = 10
    """Their magnitude, from 0 to 30."""
    mixup: float = 0.0
    """alpha of mixup (Zhang et al. 2018): each batch is mixed with itself by lambda ~ Beta(alpha, alpha). 0: off."""
    cutmix: float = 0.0
    """alpha of cutmix (Yun et al. 2019): a box is pasted instead. With mixup, a fair coin decides for each batch."""
    label_smoothing: float = 0.0
    """epsilon: targets are (1 - epsilon) for the class and epsilon / K more for each of the K (Szegedy et al. 2016)."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean in units of [0, 1]. Default: that of the data set, as `normalisation` says."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation in units of [0, 1]."""
    normalisation: str | None = None
    """data: known or measured over the training images. imagenet: that of ImageNet. teacher: what teacher.mean/std,
    T's weights file or its published weights state. Default: that of published weights (teacher.pretrained, else
    student.pretrained), else data."""
    cache: str = "auto"
    """memory: decode all files once, at image_size. off: stream them. auto: memory, if they fit into cache_gb."""
    cache_gb: float = 2.0
    """GB of decoded images that auto keeps in memory."""
    workers: int | None = None
    """Processes (threads, where all is decoded at once) that read files; 0: none. Default: the cores, at most 8."""
    broken: str = "stop"
    """stop: files that cannot be read are listed, and nothing is trained. skip: they are left out, and counted."""

    def __post_init__(self) -> None:
        check_types("data", self)
        choice("data.name", self.name, (*IN_MEMORY, *FILES))
        in_range("data.val_fraction", self.val_fraction, 0, 0.5)
        for name in self.augment or ():
            choice("data.augment", name, AUGMENTATIONS)
        in_range("data.crop_padding", self.crop_padding, 0, 16)
        for key, low, high in (
            ("train_limit", 1, _MOST_IMAGES),
            ("test_limit", 1, _MOST_IMAGES),
            ("image_size", 1, LARGEST_DIGITS if self.name == "digits" else _LARGEST_SIDE),
            ("crop_fraction", 0.1, 1),
            ("test_fraction", 0.01, 0.9),
            ("split_seed", 0, 2**31 - 1),
            ("workers", 0, 256),
        ):
            if (value := getattr(self, key)) is not None:
                in_range(f"data.{key}", value, low, high)
        in_range("data.randaugment_ops", self.randaugment_ops, 1, 16)
        in_range("data.randaugment_magnitude", self.randaugment_magnitude, 0, 30)
        in_range("data.mixup", self.mixup, 0, 100)
        in_range("data.cutmix", self.cutmix, 0, 100)
        in_range("data.label_smoothing", self.label_smoothing, 0, 0.9)
        in_range("data.cache_gb", self.cache_gb, 0, MOST)
        choice("data.normalisation", self.normalisation or "data", ("data", "imagenet", "teacher"))
        choice("data.cache", self.cache, ("auto", "memory", "off"))
        choice("data.broken", self.broken, ("stop", "skip"))
        normalisation("data", self.mean, self.std)
        self._check_use()

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

    def _check_use(self) -> None:
        """A setting that nothing reads is a misunderstanding: say so before hours of training."""
        randaugment = "randaugment" in self.augmentations
        with_splits_to_make = self.name in ("imagefolder", "webdataset")
        read = {
            "test_root": self.name == "webdataset",
            "image_size": self.name not in ("cifar10", "cifar100"),
            "crop_fraction": self.of_files,
            "test_fraction": with_splits_to_make and self.test_root is None,
            "split_seed": (with_splits_to_make and self.test_root is None) or self.test_limit is not None,
            "randaugment_ops": randaugment,
            "randaugment_magnitude": randaugment,
            "cache": self.of_files,
            "cache_gb": self.of_files and self.cache == "auto",
            "workers": self.of_files,
            "broken": self.of_files,
        }
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if value != key.default and not read.get(key.name, True):
                raise RecipeError(
                    f'data.{key.name} = {toml_value(value)} has no effect with data.name = "{self.name}"'
                    f"{'' if self.test_root is None else ' and data.test_root'}: it is read only "
                    f"{_READ_WHERE[key.name]}. Leave it out."
                )
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

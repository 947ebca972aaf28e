"""Finds the images of class folders and of splits, and their labels.

What an image file, a class folder and a split are is said in `rkd_deploy.image_folders`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rkd_deploy.data.files import ImageFiles, ImageSource
from rkd_deploy.errors import DataError
from rkd_deploy.image_folders import SUFFIXES, Visited, images_below, left_out_in_words, splits_below, subfolders
from rkd_deploy.storage import read_text

TEST_FOLDERS = ("test", "val", "valid")
"""Splits that may serve as the test split; the first that is there does. Beside test, val or valid are held out."""

_WORDS_FILES = ("words.txt", "LOC_synset_mapping.txt")


@dataclass(frozen=True)
class LabelledImages:
    """Images on disk and their labels, int64 [N]."""

    source: ImageSource
    labels_N: Tensor


@dataclass(frozen=True)
class SplitsOnDisk:
    """A data set as it lies on disk, before anything is drawn.

    Attributes:
        classes: Names of the classes, in the order of labels.
        splits: train, and test and val where they have folders of their own.
        origins: Where each split comes from, in words; the same keys.
        left_out: Number of files that are no images, by suffix, and of folders that are no splits.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, LabelledImages]
    origins: Mapping[str, str]
    left_out: Counter[str] = field(default_factory=Counter)


def split_folders(root: Path, holds_data: Callable[[Path], bool] | None = None) -> dict[str, Path]:
    """Folder of each split: train, test, and val where there are both; a root without splits is train.

    Args:
        root: The folder of a data set.
        holds_data: As for `image_folders.splits_below`.

    Raises:
        DataError: There is no such root, train stands alone or is missing, or a split has two folders.
    """
    if not os.path.isdir(root):  # of a name that is too long Path.is_dir raises
        raise DataError(f"There is no folder {root}. Name the one that holds the images: --set data.root=FOLDER")
    splits = {}
    for name, folders in splits_below(root, holds_data).items():
        if len(folders) > 1:
            raise DataError(
                f"{root} holds {' and '.join(f'{folder.name}/' for folder in folders)}, and each may be the {name} "
                "split. Keep one of them there."
            )
        splits[name] = folders[0]
    evaluated = [splits[name] for name in TEST_FOLDERS if name in splits]
    if "train" not in splits:
        if evaluated:
            raise DataError(f"{root} holds {evaluated[0].name}/ and no train/. Put the training images into train/.")
        return {"train": root}
    if not evaluated:
        raise DataError(
            f"{root} holds {splits['train'].name}/ and none of {', '.join(f'{name}/' for name in TEST_FOLDERS)}. Add "
            f"one, or take {splits['train']} as data.root: a share of it becomes the test split then "
            "(data.test_fraction)."
        )
    chosen = {"train": splits["train"], "test": evaluated[0]}
    return chosen | {"val": evaluated[1]} if "test" in splits and len(evaluated) > 1 else chosen


def scan_folder(root: Path) -> SplitsOnDisk:
    """Find the images of a folder of class folders, or of splits of such.

    Raises:
        DataError: No such folder, no or one class, a class without images, a class that train lacks, a folder that
            cannot be read or is read twice by a link.
    """
    folders = split_folders(root)
    classes = [folder.name for folder in subfolders(folders["train"])]
    if len(classes) < 2:
        holds = f"only {classes[0]}/" if classes else "no folders"
        inner = [folder for name in classes for folder in subfolders(folders["train"] / name)]
        deeper = f" Name the folder that holds them: {folders['train'] / classes[0]}." if len(inner) > 1 else ""
        raise DataError(
            f"{folders['train']} holds {holds}; there must be one folder for each of at least two classes.{deeper}"
        )
    left_out: Counter[str] = Counter()
    if folders["train"] != root:
        left_out.update(f"{folder.name}/" for folder in subfolders(root) if folder not in folders.values())
    splits = {name: _scan_split(name, folder, classes, left_out) for name, folder in folders.items()}
    return SplitsOnDisk(
        tuple(classes), splits, {name: f"folder {folder.name}" for name, folder in folders.items()}, left_out
    )


def scan_imagenet(root: Path) -> SplitsOnDisk:
    """Find the images of ImageNet's layout, ROOT/train/WNID and ROOT/val/WNID; names from a words file, if any."""
    if not (os.path.isdir(root / "train") and os.path.isdir(root / "val")):
        raise DataError(
            f"{root} does not hold train/ and val/ with a folder for each WNID, as ImageNet does. Name the folder "
            'that does with --set data.root=FOLDER, or take data.name = "imagefolder".'
        )
    on_disk = scan_folder(root)
    words = next((root / name for name in _WORDS_FILES if (root / name).is_file()), None)
    return on_disk if words is None else replace(on_disk, classes=_class_words(on_disk.classes, words))


def _scan_split(name: str, folder: Path, classes: list[str], left_out: Counter[str]) -> LabelledImages:
    names = {path.name for path in subfolders(folder)}
    if unknown := sorted(names - set(classes)):
        raise DataError(
            f"{folder} has {len(unknown)} classes that train lacks ({', '.join(unknown[:5])}): nothing could learn "
            "them. Remove them, or add training images."
        )
    if not names:
        raise DataError(f"{folder} holds no class folders, so there is nothing for {name}. Remove it, or fill it.")
    visited = Visited()
    below = {label: images_below(folder / name, visited) for label, name in enumerate(classes) if name in names}
    visited.check_links()
    split_left_out = sum((images.left_out for images in below.values()), Counter[str]())
    if empty := [classes[label] for label, images in below.items() if not images.paths]:
        instead = f" What they hold instead: {left_out_in_words(split_left_out)}." if split_left_out else ""
        raise DataError(
            f"{len(empty)} class folders of {folder} hold no images ({', '.join(empty[:5])}). Images end in "
            f"{', '.join(SUFFIXES)}.{instead} Remove the empty folders, or fill them."
        )
    left_out.update(split_left_out)
    paths = [path for images in below.values() for path in images.paths]
    labels = [label for label, images in below.items() for _ in images.paths]
    return LabelledImages(ImageFiles(paths), torch.tensor(labels))


def _class_words(wnids: tuple[str, ...], file: Path) -> tuple[str, ...]:
    """First word of each WNID, followed by the WNID where two have the same (there are two cranes)."""
    try:
        lines = [line.split(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable_list(file, error) from error
    words_of = {parts[0]: parts[1].strip() for parts in lines if len(parts) == 2}
    if missing := [wnid for wnid in wnids if wnid not in words_of]:
        raise DataError(f"{file} has no words for {len(missing)} of {len(wnids)} classes ({', '.join(missing[:5])}).")
    first_words = [words_of[wnid].split(",")[0] for wnid in wnids]
    return tuple(
        word if first_words.count(word) == 1 else f"{word} ({wnid})"
        for word, wnid in zip(first_words, wnids, strict=True)
    )


def unreadable_list(file: Path, error: OSError | UnicodeDecodeError) -> DataError:
    """The error for a list of class names that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return DataError(f"{file} cannot be read as a list of classes: {reason}. Mend or remove it.")

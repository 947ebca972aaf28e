"""Image folders: ROOT/train/CLASS/*, or ROOT/CLASS/* without splits, and ImageNet's layout.

Which files are images is torchvision's rule (`IMG_EXTENSIONS`); a class is a folder, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from rkd_deploy.data.pictures import Files, Pictures
from rkd_deploy.errors import DataError

TEST_FOLDERS = ("test", "val", "valid")
"""Where the test split may be. Beside a test folder, val or valid are what is held out."""

_WORDS = ("words.txt", "LOC_synset_mapping.txt")


@dataclass(frozen=True)
class Labelled:
    """Pictures and their labels, int64 [N]."""

    pictures: Pictures
    labels_N: Tensor


@dataclass(frozen=True)
class Layout:
    """What is found on disk.

    Attributes:
        classes: Names, in the order of labels.
        splits: train, and test and val where they have folders of their own.
        sources: The same, as words: where each comes from.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Labelled]
    sources: Mapping[str, str]


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split: train, test, and val where there are both; a root without splits is train.

    Raises:
        DataError: There is no such root, or train stands alone or is missing.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Name the one that holds the images: --set data.root=FOLDER")
    evaluated = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir():
        if evaluated:
            raise DataError(f"{root} holds {evaluated[0].name}/ and no train/. Put the training images into train/.")
        return {"train": root}
    if not evaluated:
        raise DataError(
            f"{root} holds train/ and none of {', '.join(f'{name}/' for name in TEST_FOLDERS)}. Add one, or take "
            f"{root / 'train'} as data.root: a share of it becomes the test split then (data.test_fraction)."
        )
    folders = {"train": root / "train", "test": evaluated[0]}
    return folders | {"val": evaluated[1]} if evaluated[0].name == "test" and len(evaluated) > 1 else folders


def scan_folder(root: Path) -> Layout:
    """Find the images of a folder.

    Raises:
        DataError: No such folder, no or one class, a class without images, a class that train lacks.
    """
    folders = split_folders(root)
    classes = _class_names(folders["train"])
    if len(classes) < 2:
        found = f"only {classes[0]}/" if classes else "no folders"
        raise DataError(f"{folders['train']} holds {found}; there must be one folder for each of at least two classes.")
    splits = {name: _scan_split(name, folder, classes) for name, folder in folders.items()}
    return Layout(tuple(classes), splits, {name: f"folder {folder.name}" for name, folder in folders.items()})


def scan_imagenet(root: Path) -> Layout:
    """ImageNet's layout: ROOT/train/WNID and ROOT/val/WNID; class names from a words file, if there is one."""
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        raise DataError(
            f"{root} does not hold train/ and val/ with a folder for each WNID, as ImageNet does. Name the folder "
            'that does with --set data.root=FOLDER, or take data.name = "imagefolder".'
        )
    layout = scan_folder(root)
    words = next((root / name for name in _WORDS if (root / name).is_file()), None)
    return layout if words is None else Layout(_named(layout.classes, words), layout.splits, layout.sources)


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _scan_split(name: str, folder: Path, classes: list[str]) -> Labelled:
    found = _class_names(folder)
    if unknown := sorted(set(found) - set(classes)):
        raise DataError(
            f"{folder} has {len(unknown)} classes that train lacks ({', '.join(unknown[:5])}): nothing could learn "
            "them. Remove them, or add training images."
        )
    label_of = {one: label for label, one in enumerate(classes) if one in set(found)}
    samples = make_dataset(str(folder), label_of, IMG_EXTENSIONS, allow_empty=True) if label_of else []
    counts = torch.bincount(torch.tensor([label for _, label in samples]).long(), minlength=len(classes))
    if empty := [one for one, label in label_of.items() if not counts[label]]:
        raise DataError(
            f"{len(empty)} class folders of {folder} hold no images ({', '.join(empty[:5])}). Images end in "
            f"{', '.join(IMG_EXTENSIONS)}. Remove the empty folders, or fill them."
        )
    if not samples:
        raise DataError(f"{folder} holds no class folders, so there is nothing for {name}. Remove it, or fill it.")
    return Labelled(Files([path for path, _ in samples]), torch.tensor([label for _, label in samples]))


def _named(wnids: tuple[str, ...], words: Path) -> tuple[str, ...]:
    """The first word for each WNID, followed by the WNID where two have the same (there are two cranes)."""
    lines = (line.split(maxsplit=1) for line in words.read_text(encoding="utf-8").splitlines() if line.strip())
    said = {parts[0]: parts[1].strip() for parts in lines if len(parts) == 2}
    if missing := [wnid for wnid in wnids if wnid not in said]:
        raise DataError(f"{words} has no words for {len(missing)} of {len(wnids)} classes ({', '.join(missing[:5])}).")
    short = [said[wnid].split(",")[0] for wnid in wnids]
    return tuple(one if short.count(one) == 1 else f"{one} ({wnid})" for one, wnid in zip(short, wnids, strict=True))

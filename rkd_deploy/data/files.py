"""Image files that are read one by one: where they lie, in which order, and which of them are broken.

The decoder is that of deployed models (`rkd_deploy.images`): upright by EXIF, RGB, transparency dropped, 8 bits
per channel or refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from rkd_deploy.errors import DataError
from rkd_deploy.images import decoded
from rkd_deploy.storage import storage_error, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 20
"""Broken files that a message lists; it says how many more there are."""

_EVERY_S, _AT_ONCE = 10.0, 512
_Result = TypeVar("_Result")


class Pictures(Protocol):
    """Image files by position."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """The file, for messages."""

    def open(self, position: int) -> IO[bytes]:
        """Its bytes."""

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """A random order of these positions that is good to read in: a permutation of 0 .. N - 1."""

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Name, size and time of change of every file on disk: they tell whether anything changed."""


@dataclass(frozen=True)
class Files:
    """One file for each image."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """Its path."""
        return self.paths[position]

    def open(self, position: int) -> IO[bytes]:
        """The file."""
        return open(self.paths[position], "rb")

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """Any order is as good as another."""
        return torch.randperm(len(index_N), generator=generator)

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Of every file."""
        return stamps(self.paths)


def stamps(paths: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of files."""
    for path in paths:
        facts = os.stat(path)
        yield path, facts.st_size, facts.st_mtime_ns


def remembered_at(memory: Path, kind: str, facts: Iterable[object]) -> Path:
    """Where something found out about files is kept; another place once one of these facts changes."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(repr(fact).encode())
    folder = memory / "remembered"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder / f"{kind}-{digest.hexdigest()[:32]}"


def read(pictures: Pictures, position: int) -> Image:
    """One image, upright, RGB.

    Raises:
        DataError: It is broken or gone.
    """
    name = pictures.name(position)
    try:
        with pictures.open(position) as stream:
            return decoded(stream, name)
    except OSError as error:
        raise DataError(f"{name} cannot be opened: {error.strerror or error}. Was it removed?") from error


def for_each(work: Callable[[int], _Result], positions: Sequence[int], threads: int, verb: str) -> Iterator[_Result]:
    """Results of `work` in order, by threads: decoders let go of Python's lock. A terminal is told how far it is."""
    said = time.monotonic()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(positions), _AT_ONCE):  # map takes all it is given at once, however many that are
            yield from pool.map(work, positions[first : first + _AT_ONCE])
            if sys.stderr.isatty() and time.monotonic() - said > _EVERY_S:
                said = time.monotonic()
                print(f"{verb} {first + _AT_ONCE:,} of {len(positions):,} images", file=sys.stderr)


def find_broken(pictures: Pictures, positions: Sequence[int], threads: int, memory: Path) -> dict[int, str]:
    """Decode images once to learn which cannot be: {position: what is wrong}.

    Args:
        pictures: The files.
        positions: Those to look at.
        threads: That decode at once.
        memory: Folder where the answer is kept: it is asked for again with every run, and takes minutes on large sets.
    """
    path = _broken_at(pictures, positions, memory)
    if path.exists():
        return {int(position): reason for position, reason in json.loads(path.read_text(encoding="utf-8")).items()}

    def reason(position: int) -> str | None:
        try:
            read(pictures, position)
        except DataError as error:
            return str(error)
        return None

    reasons = for_each(reason, positions, threads, "Checked")
    broken = {position: found for position, found in zip(positions, reasons, strict=True) if found is not None}
    remember_broken(pictures, positions, broken, memory)
    return broken


def remember_broken(pictures: Pictures, positions: Sequence[int], broken: Mapping[int, str], memory: Path) -> None:
    """Keep the answer of `find_broken`, where decoding has given it."""
    write_text(_broken_at(pictures, positions, memory), json.dumps(broken))


def _broken_at(pictures: Pictures, positions: Sequence[int], memory: Path) -> Path:
    return remembered_at(memory, "broken", chain(pictures.stamps(), positions))


def judge(broken: Sequence[str], total: int, policy: str) -> None:
    """Stop at broken images, unless they are to be skipped.

    Raises:
        DataError: Lists the first of them, and says how many there are.
    """
    if not broken or policy == "skip":
        return
    more = f"\n  ... and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
    listed = "".join(f"\n  {line}" for line in broken[:SHOWN])
    raise DataError(
        f"{len(broken):,} of {total:,} images cannot be read:{listed}{more}\n"
        "Mend or remove them, or leave them out with: --set data.broken=skip"
    )


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

"""Finds image files on disk, their labels, and which of them are broken.

The decoder is that of deployed models (`rkd_deploy.images`): upright by EXIF, RGB, transparency dropped, 8 bits
per channel or refused. What an image file, a class folder and a split are is said in `rkd_deploy.image_folders`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from rkd_deploy.errors import DataError
from rkd_deploy.image_folders import SUFFIXES, images_below, left_out_in_words, splits_below, subfolders
from rkd_deploy.images import FILE_LIMIT, decoded
from rkd_deploy.storage import open_regular, read_text, storage_error, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

LISTED = 20
"""Number of broken files that a message lists; it says how many more there are."""

_PROGRESS_S, _CHUNK = 10.0, 512
_DECODER = 2
"""Version of what the decoder refuses; a new one makes everything that is remembered of broken files out of date."""
_Result = TypeVar("_Result")


class ImageSource(Protocol):
    """Images on disk by position, still encoded."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """The file of an image, for messages."""

    def open(self, position: int) -> IO[bytes]:
        """The bytes of an image file."""

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """A random order of these positions that is good to read in: a permutation of 0 .. N - 1."""

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Name, size and time of change of every file on disk: they tell whether anything changed."""


@dataclass(frozen=True)
class ImageFiles:
    """An image source with one file for each image."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """The path of an image."""
        return self.paths[position]

    def open(self, position: int) -> IO[bytes]:
        """The file of an image."""
        return open_regular(self.paths[position], limit=FILE_LIMIT)

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """A uniformly random order: any is as good to read in as another."""
        return torch.randperm(len(index_N), generator=generator)

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Name, size and time of change of every image file."""
        return file_stamps(self.paths)


def file_stamps(paths: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size in bytes and time of change in ns of files; -1 of one that cannot be looked at."""
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:  # a link to nothing, for example: an image that is broken like any other
            yield path, -1, -1
        else:
            yield path, status.st_size, status.st_mtime_ns


def cache_path(memory: Path, kind: str, facts: Iterable[object]) -> Path:
    """Path of a cache file for something that was learnt of files; another path once a fact about them changes.

    Args:
        memory: Folder of the cache.
        kind: What was learnt, the beginning of the file's name.
        facts: What the cached content depends on.

    Raises:
        StorageError: The folder cannot be made.
    """
    # A digest of all facts is the name: what was learnt of other files is never read, and needs no comparing.
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(repr(fact).encode())
    folder = memory / "remembered"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder / f"{kind}-{digest.hexdigest()[:32]}"


def read_image(source: ImageSource, position: int) -> Image:
    """Read one image, upright, as RGB.

    Raises:
        DataError: The image is broken or gone.
    """
    name = source.name(position)
    try:
        with source.open(position) as stream:
            return decoded(stream, name)
    except OSError as error:
        raise DataError(f"{name} cannot be opened: {error.strerror or error}. Was it moved or removed?") from error


def map_in_threads(
    work: Callable[[int], _Result], positions: Sequence[int], threads: int, verb: str
) -> Iterator[_Result]:
    """Do `work` by threads and give its results in order; a terminal sees how far it is.

    Threads are enough: decoders let go of Python's lock.
    """
    last_print = time.monotonic()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(positions), _CHUNK):  # map() would queue all positions at once, and never be stopped
            yield from pool.map(work, positions[first : first + _CHUNK])
            if sys.stderr.isatty() and time.monotonic() - last_print > _PROGRESS_S:
                last_print = time.monotonic()
                print(f"{verb} {first + _CHUNK:,} of {len(positions):,} images", file=sys.stderr)


def find_broken(source: ImageSource, positions: Sequence[int], threads: int, memory: Path) -> dict[int, str]:
    """Decode images once to learn which are broken; gives what is wrong by position.

    Args:
        source: The images.
        positions: Positions of the images to look at.
        threads: Number of threads that decode.
        memory: Folder where the answer is kept: every run asks for it again, and it takes minutes on large sets.
    """
    path = _broken_path(source, positions, memory)
    if (known := _known_broken(path)) is not None:
        return known

    def reason(position: int) -> str | None:
        try:
            read_image(source, position)
        except DataError as error:
            return str(error)
        return None

    reasons = map_in_threads(reason, positions, threads, "Checked")
    broken = {position: reason for position, reason in zip(positions, reasons, strict=True) if reason is not None}
    remember_broken(source, positions, broken, memory)
    return broken


def remember_broken(source: ImageSource, positions: Sequence[int], broken: Mapping[int, str], memory: Path) -> None:
    """Cache the answer of `find_broken`, where decoding has given it already."""
    write_json(_broken_path(source, positions, memory), {str(position): reason for position, reason in broken.items()})


def _known_broken(path: Path) -> dict[int, str] | None:
    """The cached answer; None where there is none, or the file holds something else."""
    try:
        content = json.loads(read_text(path))
        return {int(position): str(reason) for position, reason in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _broken_path(source: ImageSource, positions: Sequence[int], memory: Path) -> Path:
    return cache_path(memory, "broken", chain([_DECODER], source.stamps(), positions))


def refuse_broken(broken: Sequence[str], total: int, policy: str) -> None:
    """Stop at broken images, unless they are to be skipped.

    Args:
        broken: What is wrong with each broken image.
        total: Number of images, broken ones included.
        policy: ``"skip"`` or ``"stop"``.

    Raises:
        DataError: Lists the first of them, and says how many there are.
    """
    if not broken or policy == "skip":
        return
    more = f"\n  ... and {len(broken) - LISTED:,} more" if len(broken) > LISTED else ""
    listed = "".join(f"\n  {line}" for line in broken[:LISTED])
    raise DataError(
        f"{len(broken):,} of {total:,} images cannot be read:{listed}{more}\n"
        "Mend or remove them, or leave them out with: --set data.broken=skip"
    )


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
        raise DataError(f"{folders['train']} holds {holds}; there must be one folder for each of at least two classes.")
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
    visited: dict[tuple[int, int], str] = {}
    below = {label: images_below(folder / name, visited) for label, name in enumerate(classes) if name in names}
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

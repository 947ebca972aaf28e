"""What an image file, a class folder and a split on disk are: one rule for every room.

Training, calibration, accuracy on a folder and prediction all read the same kinds of files. What is left out is counted
by its suffix, so that nobody has to guess why there are fewer images than files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rkd_deploy.errors import DataError

IMAGE_FORMATS: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Formats by Pillow's names, with their suffixes. Of a GIF or TIFF with several pictures the first is read.

No others: Pillow would start Ghostscript for an EPS, and AVIF is in some of its builds alone.
"""
FORMATS_IN_WORDS = "JPEG, PNG, BMP, WebP, TIFF, GIF or PPM"
SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

# Folders that systems make beside people's own: of macOS archives, Synology (thumbnails), Windows, ext4.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")

_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "valid",
    "validation": "val",
    "validating": "val",
}
_PARTS = re.compile(r"(fold|split|part|partition|subset)[\W_]*(\d+|[a-z])", re.IGNORECASE)
"""Names of splits that do not say what they are for."""
_FILLERS = {"", "set", "data", "dataset", "images", "image", "imgs", "img", "photos", "pictures", "seg", "split"}


@dataclass(frozen=True)
class ImagesBelow:
    """The images of a folder and of the folders in it.

    Attributes:
        paths: Files with an image's suffix, folder by folder, each sorted; whether they can be decoded is not known.
        left_out: How many other files there are, by suffix. Hidden ones are not counted.
    """

    paths: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is one that systems keep for themselves, and never an image or a class."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


class Visited:
    """What was looked through so far: folders, and links to image files, which may lie in one of them."""

    def __init__(self) -> None:
        self._folders: dict[tuple[int, int], str] = {}
        self._links: list[tuple[str, str]] = []

    def add_folder(self, folder: str) -> None:
        """Note a folder, by device and inode.

        Raises:
            DataError: It cannot be read, or was looked through already, which only a link can cause.
        """
        earlier = self._folders.setdefault(_identity(folder), folder)
        if earlier != folder:
            raise DataError(
                f"{folder} is a link to a folder that is read as {earlier} already: its images would count twice. "
                "Remove the link."
            )

    def add_link(self, link: str) -> None:
        """Note a link to a file."""
        self._links.append((link, os.path.join(os.path.dirname(link), os.readlink(link))))

    def check_links(self) -> None:
        """Refuse links to images that are read anyway; to be called when all folders were looked through.

        Raises:
            DataError: There is such a link.
        """
        read_as: dict[str, str | None] = {}
        linked: dict[str, str] = {}
        for link, target in self._links:
            parent, name = os.path.split(target)
            if parent not in read_as:
                read_as[parent] = self._folders.get(_identity(parent)) if os.path.isdir(parent) else None
            folder = read_as[parent]
            twin = linked.setdefault(target, link) if folder is None else os.path.join(folder, name)
            if twin != link and is_image(name) and os.path.isfile(link):
                raise DataError(
                    f"{link} is a link to a file that is read as {twin} already: it would count twice, and may be "
                    "learnt from and tested on. Remove the link."
                )


def images_below(folder: Path, visited: Visited | None = None) -> ImagesBelow:
    """Find the images of a folder; links to folders are followed.

    Args:
        folder: Where to look.
        visited: What was looked through before, which this folder is added to: give the same one for all classes of a
            split, and call its `check_links` after the last.

    Raises:
        DataError: A folder cannot be read, or a link leads to what is read anyway.
    """
    seen = Visited() if visited is None else visited
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    for parent, names in sorted(
        _rows(folder, seen)
    ):  # the order of torchvision's ImageFolder: subsets by seed depend on it
        for name in sorted(names):
            if is_image(name):
                paths.append(os.path.join(parent, name))
            elif not is_hidden(name):
                left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    if visited is None:
        seen.check_links()
    return ImagesBelow(tuple(paths), left_out)


def _rows(folder: Path, visited: Visited) -> Iterator[tuple[str, list[str]]]:
    """A folder and those in it, each with the names of its files."""
    open_ends = [str(folder)]
    while open_ends:
        visited.add_folder(parent := open_ends.pop())
        names = []
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if not entry.is_dir():
                        names.append(entry.name)
                        if entry.is_symlink() and is_image(entry.name):
                            visited.add_link(entry.path)
                    elif not is_hidden(entry.name):
                        open_ends.append(entry.path)
        except OSError as error:  # a folder passed over would be one whose images nobody misses
            raise _unreadable(folder, error) from error
        yield parent, names


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted by name; each may be a class or a split.

    Raises:
        DataError: It is no folder, or cannot be read.
    """
    try:
        return sorted((path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)), key=_name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def splits_below(root: Path, holds_data: Callable[[Path], bool] | None = None) -> dict[str, list[Path]]:
    """The folders of a root that are splits by their names: train, test, val and valid.

    `Training`, `test_images`, `seg_train` and the like are names of splits too. A folder of class `train`, or `test`,
    holds images and no folders, and is none.

    Args:
        root: The folder of a data set.
        holds_data: Whether a folder can be a split. Default: it holds folders, or no image.

    Raises:
        DataError: The root cannot be read; its folders are splits that do not say what they are for; or each class
            folder has splits of its own.
    """
    folders, holds_data = subfolders(root), holds_data or _holds_classes
    words = {folder: re.findall("[a-z]+", folder.name.lower()) for folder in folders}
    # A word that all folders have (flowers_train, flowers_test) is the name of the data set, and no hint at a split.
    shared = set[str]().union(*words.values()) if len(folders) > 1 else set()
    shared = {word for word in shared - set(_SPLIT_OF_WORD) if all(word in others for others in words.values())}
    splits: dict[str, list[Path]] = {}
    for folder in folders:
        split = _split_of(word for word in words[folder] if word not in shared)
        if split is not None and holds_data(folder):
            splits.setdefault(split, []).append(folder)
    if not splits and len(folders) > 1:
        _check_not_parts(root, folders)
    return splits


def left_out_below(folder: Path) -> Counter[str]:
    """How many files of the class folders in a folder are no images, by suffix.

    Raises:
        DataError: As for `images_below`.
    """
    visited = Visited()
    return sum((images_below(path, visited).left_out for path in subfolders(folder)), Counter[str]())


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """What was left out, the most frequent suffix first, e.g. ``3 .avif, 1 .txt``."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items(), key=_by_count))


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _name(path: Path) -> str:
    return path.name


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode of a folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(Path(folder), error) from error
    return status.st_dev, status.st_ino


def _split_of(words: Iterable[str]) -> str | None:
    """The split that the words of a name say, if they say one and nothing else."""
    splits = []
    for word in words:
        stem = re.sub("(set|data|images|imgs)$", "", word)
        if stem in _SPLIT_OF_WORD:
            splits.append(_SPLIT_OF_WORD[stem])
        elif stem not in _FILLERS:
            return None
    return splits[0] if len(splits) == 1 else None


def _holds_classes(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            names = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return any(is_folder and not is_hidden(name) for name, is_folder in names) or not any(
        is_image(name) for name, _ in names
    )


def _check_not_parts(root: Path, folders: list[Path]) -> None:
    if all(_PARTS.fullmatch(folder.name) for folder in folders) and all(subfolders(folder) for folder in folders):
        raise DataError(
            f"{root} holds {', '.join(folder.name for folder in folders[:5])}: splits that do not say what they are "
            "for. Put the class folders to learn from into train/ and those to test on into test/."
        )
    inner = [{_split_of(re.findall("[a-z]+", path.name.lower())) for path in subfolders(folder)} for folder in folders]
    if all("train" in splits and len(splits) > 1 and None not in splits for splits in inner):
        raise DataError(
            f"Each class folder of {root} has splits of its own ({folders[0].name}/train and so on), which would be "
            "read as one. Turn it round: train/CLASS and test/CLASS."
        )


def _unreadable(folder: Path, error: OSError) -> DataError:
    place = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
    return DataError(f"{folder} cannot be read: {error.strerror}{place}. Mend its permissions, or name another folder.")

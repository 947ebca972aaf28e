"""Reads WebDataset shards in place: tar files of samples KEY.jpg (or .png, ..) and KEY.cls.

Sets that no single disk holds lie as a few thousand large files on several disks or network mounts, named by one
brace pattern: "/mnt/{a,b}/train-{000..511}.tar". Shards must be files: each is indexed once, from its headers, and its
samples are then read in place. That costs a seek for each image and buys what a stream cannot have: a number of images,
a held-out split, an order that depends on (seed, epoch) alone whatever the number of processes, and resuming at any
batch without reading what was before it. So that reads stay near each other, an epoch shuffles the shards, and then the
samples within groups of `GROUP` shards.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from rkd_deploy.data.files import cache_path, file_stamps
from rkd_deploy.data.folders import LabelledImages, SplitsOnDisk, split_folders, unreadable_list
from rkd_deploy.errors import DataError, require
from rkd_deploy.image_folders import SUFFIXES, is_hidden
from rkd_deploy.images import FILE_LIMIT
from rkd_deploy.storage import open_regular, read_text, write_bytes

GROUP = 16
"""Number of shards that are read from at the same time."""

_LARGEST_LABEL = 999_999
_MOST_SHARDS, _DIGITS = 1_000_000, 12


@dataclass(frozen=True)
class Shards:
    """An image source inside tar files.

    Attributes:
        paths: The tar files.
        names: Name of every image inside its tar file.
        shard_N: Position in `paths` of the tar file of each image.
        offset_N: Where the bytes of each image begin there.
        size_N: Number of bytes of each image.
    """

    paths: Sequence[str]
    names: Sequence[str]
    shard_N: Tensor
    offset_N: Tensor
    size_N: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def name(self, position: int) -> str:
        """Tar file and member of an image."""
        return f"{self.paths[int(self.shard_N[position])]}:{self.names[position]}"

    def open(self, position: int) -> IO[bytes]:
        """The bytes of an image."""
        with open_regular(self.paths[int(self.shard_N[position])]) as stream:
            stream.seek(int(self.offset_N[position]))
            return io.BytesIO(stream.read(int(self.size_N[position])))

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """Shards in random order, then samples at random within each `GROUP` of them."""
        place_of_shard = torch.randperm(len(self.paths), generator=generator)
        order_N = torch.randperm(len(index_N), generator=generator)
        group_N = place_of_shard[self.shard_N[index_N[order_N]]] // GROUP
        return order_N[group_N.argsort(stable=True)]  # stable: within a group the order stays the random one

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Name, size and time of change of every tar file."""
        return file_stamps(self.paths)


def scan_shards(root: str, test_root: str | None, memory: Path) -> tuple[SplitsOnDisk, list[str]]:
    """Index shards, and say what is wrong with each sample that cannot be used.

    Args:
        root: Folder (of shards, or of train/ and test/ or val/ with shards in them), or a brace pattern.
        test_root: Folder or brace pattern of the test split; None: `root` says it, or it is drawn.
        memory: Folder where indexes are cached.

    Raises:
        DataError: No shards, one that is missing or broken, none with an image and its class, labels beyond the class
            names.
    """
    folders = split_folders(Path(root), _holds_shards) if os.path.isdir(root) else {"train": root}
    paths_of = {name: _shard_paths(str(where)) for name, where in folders.items()}
    if test_root is not None:
        paths_of["test"] = _shard_paths(test_root)
    splits, broken = {}, []
    for name, paths in paths_of.items():
        splits[name], broken_samples = _indexed(paths, memory)
        if not len(splits[name].labels_N):
            raise _no_samples(name, paths, broken_samples)
        broken += broken_samples
    classes = _class_names(Path(paths_of["train"][0]), splits["train"].labels_N)
    for name, split in splits.items():
        if (largest := int(split.labels_N.max())) >= len(classes):
            raise DataError(f"The {name} shards have a label {largest}, and there are {len(classes)} classes, from 0.")
    return SplitsOnDisk(classes, splits, {name: f"{len(paths)} shards" for name, paths in paths_of.items()}), broken


def _no_samples(split: str, paths: list[str], broken: list[str]) -> DataError:
    reasons = Counter(line.partition("\t")[2] for line in (line.replace(" has ", "\thas ", 1) for line in broken))
    listed = "; ".join(f"{count:,} {reason.rstrip('.')}" for reason, count in reasons.most_common(5))
    return DataError(
        f"None of the {len(broken):,} samples in the {len(paths)} {split} shards (first: {paths[0]}) has an image and "
        f"its class{f': {listed}' if listed else ''}. A sample is KEY.cls, a number, and KEY with one of "
        f"{', '.join(SUFFIXES)}. Write them so."
    )


def _holds_shards(folder: Path) -> bool:
    return bool(_tars(folder)) or not any(folder.iterdir())


def _tars(folder: Path) -> list[str]:
    try:
        return sorted(str(path) for path in folder.glob("*.tar") if not is_hidden(path.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}. Mend its permissions.") from error


def _shard_paths(where: str) -> list[str]:
    if os.path.isdir(where):
        paths = _tars(Path(where))
        if not paths:
            raise DataError(f"{where} holds no .tar files. Name a folder of shards, or a brace pattern.")
        return paths
    paths = _expanded(where)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} shards of {where} are no files here (first: {missing[0]}). Shards are "
            "read in place: mount remote ones, or copy them."
        )
    return paths


def _expanded(pattern: str) -> list[str]:
    """The paths that a brace pattern stands for."""
    ends = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if (
        any(len(end) > _DIGITS for pair in ends for end in pair)
        or math.prod(1 + abs(int(last) - int(first)) for first, last in ends) > _MOST_SHARDS
    ):
        raise DataError(f"{pattern} stands for more than {_MOST_SHARDS:,} shards. Name those that there are.")
    try:
        return list(require("webdataset.shardlists", "webdataset").expand_urls(pattern))
    except ValueError as error:  # braces that do not close
        raise DataError(f"{pattern} is no brace pattern: {error}. Write it so: train-{{000..511}}.tar") from error


def _indexed(paths: list[str], memory: Path) -> tuple[LabelledImages, list[str]]:
    """Samples of tar files, and what is wrong with those that cannot be used, from the cached index."""
    file = cache_path(memory, "shards", chain([SUFFIXES], file_stamps(paths))).with_suffix(".npz")
    try:
        return _read_index(file, paths)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or damaged
        content = io.BytesIO()
        np.savez(content, **_index(paths))
        write_bytes(file, content.getvalue())
        return _read_index(file, paths)


def _read_index(file: Path, paths: list[str]) -> tuple[LabelledImages, list[str]]:
    with open_regular(file) as stream, np.load(stream, allow_pickle=False) as index:
        shard_N, offset_N, size_N, labels_N = (
            torch.from_numpy(index[key].astype(np.int64)) for key in ("shard", "offset", "size", "label")
        )
        source = Shards(paths, index["name"].tolist(), shard_N, offset_N, size_N)
        return LabelledImages(source, labels_N), index["broken"].tolist()


def _index(paths: list[str]) -> dict[str, Any]:
    """Columns of the index: shard, offset, size, label and name of each sample, and what is wrong with the others."""
    rows: list[tuple[int, int, int, int, str]] = []
    broken: list[str] = []
    for shard, path in enumerate(paths):
        try:
            # "r:" is plain: nothing can be read in place in a compressed one
            with open_regular(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for key, members in _samples(archive):
                    sample = _sample(archive, members)
                    if isinstance(sample, str):
                        broken.append(f"{path}:{key} {sample}")
                    else:
                        rows.append((shard, *sample))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two: absurd sizes in headers
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} is no whole, uncompressed tar file ({reason}). Write or copy it again.") from error
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return dict(zip(("shard", "offset", "size", "label", "name"), map(np.array, columns), strict=True)) | {
        "broken": np.array(broken, dtype=str)
    }


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys of samples and their members by extension: members of one key follow one another."""
    split_name = require("webdataset.tariterators", "webdataset").base_plus_ext
    key, members = None, dict[str, tarfile.TarInfo]()
    for member in archive:
        usable = member.isfile() and not any(map(is_hidden, Path(member.name).parts))
        member_key, extension = split_name(member.name) if usable else (None, None)
        if member_key is None:
            continue
        if member_key != key:
            if key is not None:
                yield key, members
            key, members = member_key, {}
        members[str(extension).lower()] = member
    if key is not None:
        yield key, members


def _sample(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> tuple[int, int, int, str] | str:
    """Offset, size, label and name of the image of a sample, or what is wrong with it."""
    image = next((members[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in members), None)
    if image is None:
        return f"has no image, only {', '.join(members)}."
    if image.size > FILE_LIMIT:
        return f"has an image of {image.size:,} bytes, and at most {FILE_LIMIT:,} are read."
    if "cls" not in members:
        return "has no .cls, so no label."
    stream = archive.extractfile(members["cls"])
    text = stream.read(64).decode("ascii", "replace").strip() if stream else ""
    if not text.isdecimal() or int(text) > _LARGEST_LABEL:
        return f"has the .cls {text[:20]!r}, which is no class number."
    return image.offset_data, image.size, int(text), image.name


def _class_names(first: Path, labels_N: Tensor) -> tuple[str, ...]:
    """Class names from classes.txt beside the first shard or one folder higher; else the numbers themselves."""
    for folder in (first.parent, first.parent.parent):
        file = folder / "classes.txt"
        try:
            return tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable_list(file, error) from error
    return tuple(str(label) for label in range(int(labels_N.max()) + 1))

"""WebDataset shards: tar files of samples KEY.jpg (or .png, ...) and KEY.cls, the class as a decimal number.

Sets that no single disk holds lie as a few thousand large files on several disks or network mounts, named by one
brace pattern: "/mnt/{a,b}/train-{000..511}.tar". Shards must be files: each is indexed once, from its headers, and its
samples are then read in place. That costs a seek for each image and buys what a stream cannot have: a number of images,
a held-out split, an order that depends on (seed, epoch) alone whatever the number of processes, and resuming at any
batch without reading what was before it. So that reads stay near each other, an epoch shuffles the shards, and then the
samples within groups of `GROUP` shards.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from rkd_deploy.data.files import Labelled, Layout, remembered_at, split_folders, stamps
from rkd_deploy.errors import DataError, require
from rkd_deploy.storage import write_bytes

GROUP = 16
"""Shards that are read from at the same time."""


@dataclass(frozen=True)
class Shards:
    """Images inside tar files.

    Attributes:
        paths: The tar files.
        names: Of every image, inside its tar file.
        shard_N: Which tar file.
        offset_N: Where its bytes begin there.
        size_N: How many there are.
    """

    paths: Sequence[str]
    names: Sequence[str]
    shard_N: Tensor
    offset_N: Tensor
    size_N: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def name(self, position: int) -> str:
        """Tar file and member."""
        return f"{self.paths[int(self.shard_N[position])]}:{self.names[position]}"

    def open(self, position: int) -> IO[bytes]:
        """Its bytes."""
        with open(self.paths[int(self.shard_N[position])], "rb") as stream:
            stream.seek(int(self.offset_N[position]))
            return io.BytesIO(stream.read(int(self.size_N[position])))

    def shuffled(self, index_N: Tensor, generator: torch.Generator) -> Tensor:
        """Shards in random order, then samples at random within each `GROUP` of them."""
        place = torch.randperm(len(self.paths), generator=generator)
        order_N = torch.randperm(len(index_N), generator=generator)
        group_N = place[self.shard_N[index_N[order_N]]] // GROUP
        return order_N[group_N.argsort(stable=True)]

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Of every tar file."""
        return stamps(self.paths)


def scan_shards(root: str, test_root: str | None, memory: Path) -> tuple[Layout, list[str]]:
    """Index shards, and say what is wrong with each sample that cannot be used.

    Args:
        root: Folder (of shards, or of train/ and test/ or val/ with shards in them), or a brace pattern.
        test_root: The same for the test split, or None.
        memory: Folder where indexes are kept.

    Raises:
        DataError: No shards, one that is missing or broken, labels beyond the class names.
    """
    folders = split_folders(Path(root)) if Path(root).is_dir() else {"train": root}
    chosen = {name: _expanded(str(where)) for name, where in folders.items()}
    if test_root is not None:
        chosen["test"] = _expanded(test_root)
    splits, broken = {}, []
    for name, paths in chosen.items():
        splits[name], damaged = _indexed(paths, memory)
        broken += damaged
    classes = _classes(Path(chosen["train"][0]), splits["train"].labels_N)
    for name, split in splits.items():
        if len(split.labels_N) and (largest := int(split.labels_N.max())) >= len(classes):
            raise DataError(f"The {name} shards have a label {largest}, and there are {len(classes)} classes, from 0.")
    return Layout(classes, splits, {name: f"{len(paths)} shards" for name, paths in chosen.items()}), broken


def _expanded(where: str) -> list[str]:
    if Path(where).is_dir():
        paths = sorted(str(path) for path in Path(where).glob("*.tar"))
        if not paths:
            raise DataError(f"{where} holds no .tar files. Name a folder of shards, or a brace pattern.")
        return paths
    paths = list(require("webdataset.shardlists", "webdataset").expand_urls(where))
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} shards of {where} are no files here (first: {missing[0]}). Shards are "
            "read in place: mount remote ones, or copy them."
        )
    return paths


def _indexed(paths: list[str], memory: Path) -> tuple[Labelled, list[str]]:
    file = remembered_at(memory, "shards", stamps(paths)).with_suffix(".npz")
    if not file.exists():
        content = io.BytesIO()
        np.savez(content, **_index(paths))
        write_bytes(file, content.getvalue())
    with np.load(file, allow_pickle=False) as index:
        shard_N, offset_N, size_N, labels_N = (
            torch.from_numpy(index[key].astype(np.int64)) for key in ("shard", "offset", "size", "label")
        )
        pictures = Shards(paths, index["name"].tolist(), shard_N, offset_N, size_N)
        return Labelled(pictures, labels_N), index["broken"].tolist()


def _index(paths: list[str]) -> dict[str, Any]:
    rows: list[tuple[int, int, int, int, str]] = []
    broken: list[str] = []
    for shard, path in enumerate(paths):
        try:
            with tarfile.open(path, "r:") as archive:  # plain: nothing can be read in place in a compressed one
                for key, members in _samples(archive):
                    found = _sample(archive, members)
                    if isinstance(found, str):
                        broken.append(f"{path}:{key} {found}")
                    else:
                        rows.append((shard, *found))
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path} is no whole, uncompressed tar file ({error}). Write or copy it again.") from error
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return dict(zip(("shard", "offset", "size", "label", "name"), map(np.array, columns), strict=True)) | {
        "broken": np.array(broken, dtype=str)
    }


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members that follow one another and have one key, by their extensions."""
    split_name = require("webdataset.tariterators", "webdataset").base_plus_ext
    key, members = None, dict[str, tarfile.TarInfo]()
    for member in archive:
        own, extension = split_name(member.name) if member.isfile() else (None, None)
        if own is None:
            continue
        if own != key:
            if key is not None:
                yield key, members
            key, members = own, {}
        members[str(extension).lower()] = member
    if key is not None:
        yield key, members


def _sample(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> tuple[int, int, int, str] | str:
    """Offset, size, label and name of the image of a sample, or what is wrong with it."""
    image = next((members[extension[1:]] for extension in IMG_EXTENSIONS if extension[1:] in members), None)
    if image is None:
        return f"has no image, only {', '.join(members)}."
    if "cls" not in members:
        return "has no .cls, so no label."
    stream = archive.extractfile(members["cls"])
    text = stream.read().decode("ascii", "replace").strip() if stream else ""
    if not text.isdecimal():
        return f"has the .cls {text[:20]!r}, which is no class number."
    return image.offset_data, image.size, int(text), image.name


def _classes(first: Path, labels_N: Tensor) -> tuple[str, ...]:
    """Lines of classes.txt beside the shards or one folder higher; else the numbers themselves."""
    for folder in (first.parent, first.parent.parent):
        if (file := folder / "classes.txt").is_file():
            return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(str(label) for label in range(int(labels_N.max()) + 1 if len(labels_N) else 0))

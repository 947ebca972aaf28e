"""Reads image files on disk, one by one, and remembers which of them are broken.

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

from rkd_deploy.errors import DataError
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
        moved = " Was it moved or removed?" if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"{name} cannot be opened: {error.strerror or error}.{moved}") from error


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

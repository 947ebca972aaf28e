"""Classifies thousands of files in bounded memory, passing over what cannot be read."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import DataError
from rkd_deploy.image_folders import FORMATS_IN_WORDS, images_below, is_image
from rkd_deploy.images import FILE_LIMIT, Pixels, decoded, fitted, to_array
from rkd_deploy.serve.classifier import Classifier, Prediction

STANDARD_INPUT = "-"
BULK_BATCH = 16
"""Images that are run at once, and decoded meanwhile for the next run: 20 MB of pixels and inputs at 224 x 224."""


@dataclass(frozen=True)
class ImageNames:
    """Images that were asked for, by name.

    Attributes:
        names: Paths, and `STANDARD_INPUT`; whether each can be read shows when it is.
        unreadable: Why a folder or a glob gave no images, a message each.
        left_out: How many other files lie in the folders, by suffix.
    """

    names: tuple[str, ...]
    unreadable: tuple[str, ...]
    left_out: Counter[str]


@dataclass(frozen=True)
class ClassifiedImage:
    """The answer to one image: its most probable classes, best first, or why it could not be read."""

    name: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


def find_images(arguments: Sequence[str]) -> ImageNames:
    """Turn what a person names into images.

    Args:
        arguments: Each is a file, which is taken whatever its suffix; a folder, whose images are taken and those of the
            folders in it; a glob such as ``photos/**/*.jpg``, for shells that expand none, of which files with an
            image's suffix and folders are taken; or ``-``, one image from standard input.
    """
    names: list[str] = []
    unreadable: list[str] = []
    left_out: Counter[str] = Counter()
    for argument in arguments:
        count = len(names)
        is_pattern = glob.has_magic(argument) and not os.path.lexists(argument)
        try:
            for path in sorted(glob.iglob(argument, recursive=True)) if is_pattern else [argument]:
                if os.path.isdir(path):
                    below = images_below(Path(path))
                    names += below.paths
                    left_out += below.left_out
                elif not is_pattern or is_image(os.path.basename(path)):
                    names.append(path)
            if len(names) == count:
                kind = "matches no image" if is_pattern else "is a folder without images"
                raise DataError(f"{argument} {kind} ({FORMATS_IN_WORDS}). Name a file, or another folder.")
        except DataError as error:
            unreadable.append(str(error))
    return ImageNames(tuple(names), tuple(unreadable), left_out)


def classify_all(classifier: Classifier, names: Sequence[str], top: int = 5) -> Iterator[ClassifiedImage]:
    """Classify images in their order, a batch at a time, while the next batch is decoded.

    Args:
        classifier: The model.
        names: Paths; ``-`` is one image from standard input, and is read once.
        top: How many classes of each; at most all of them.

    Raises:
        UsageError: `top` is no whole number from 1 on.
        BackendError: The run failed or gave numbers that are not finite.
    """
    preprocess = classifier.card.preprocess
    batches = [names[start : start + BULK_BATCH] for start in range(0, len(names), BULK_BATCH)]
    # Pillow's decoders and resize leave the interpreter's lock, so threads do for decoding.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        coming = [pool.submit(_read, name, preprocess) for name in batches[0]] if batches else []
        try:
            for number, batch in enumerate(batches):
                images = [decoding.result() for decoding in coming]
                following = batches[number + 1] if number + 1 < len(batches) else ()
                coming = [pool.submit(_read, name, preprocess) for name in following]
                pixels = [image for image in images if not isinstance(image, str)]
                answers = iter(classifier.predict_batch(np.stack(pixels), top) if pixels else ())
                for name, image in zip(batch, images, strict=True):
                    if isinstance(image, str):
                        yield ClassifiedImage(name, error=image)
                    else:
                        yield ClassifiedImage(name, tuple(next(answers)))
        finally:
            pool.shutdown(cancel_futures=True)


def _read(name: str, preprocess: Preprocess) -> Pixels | str:
    """An image as the model takes it, or why it cannot be read."""
    try:
        if name == STANDARD_INPUT:
            return fitted(decoded(_standard_input(), "standard input", preprocess.channels), preprocess)
        return to_array(name, preprocess)
    except DataError as error:
        return str(error)


def _standard_input() -> io.BytesIO:
    content = sys.stdin.buffer.read(FILE_LIMIT + 1) if sys.stdin is not None else b""
    if len(content) > FILE_LIMIT:
        raise DataError(f"it has more than the {FILE_LIMIT:,} bytes that are read. Scale it down.")
    if not content:
        raise DataError("standard input is empty; it must be an image. Pipe one in, or name a file.")
    return io.BytesIO(content)

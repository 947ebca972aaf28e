"""Images that a lower precision is calibrated on and judged on.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import DataError, UsageError
from rkd_deploy.export.precision.options import QUANTISED, PrecisionOptions
from rkd_deploy.image_folders import SUFFIXES, images_below, left_out_in_words
from rkd_deploy.images import Pixels, as_input, to_array

COUNT = 256
"""Images to calibrate on, unless another number is asked for."""
LEAST = 16
"""Fewer say too little about the ranges that other images reach."""


@dataclass(frozen=True)
class Calibration:
    """The images, and where they come from.

    Attributes:
        images_NHWC: uint8 [N, H, W, C], of the model's size.
        source: What they were drawn from, in words.
        seed: Seed that drew them.

    Raises:
        DataError: They are fewer than `LEAST`.
    """

    images_NHWC: Pixels
    source: str
    seed: int

    def __post_init__(self) -> None:
        if len(self.images_NHWC) < LEAST:
            raise DataError(
                f"{len(self.images_NHWC)} images of {self.source} are too few to calibrate on; it takes at least "
                f"{LEAST}, better {COUNT}. Give more images, or raise --calibration-count."
            )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of shape and pixels, in order."""
        digest = hashlib.sha256(repr(self.images_NHWC.shape).encode())
        digest.update(self.images_NHWC.tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What the card says of them."""
        return {"images": len(self.images_NHWC), "source": self.source, "seed": self.seed, "sha256": self.sha256}


def calibration_from_folder(
    folder: Path, preprocess: Preprocess, count: int | None = None, seed: int = 0
) -> Calibration:
    """Draw images from a folder and the folders in it, cropped to the model's size as `load` does.

    Args:
        folder: Holds images (see `rkd_deploy.image_folders`); labels do not matter.
        preprocess: The model's rule.
        count: How many. Default: `COUNT`, or all where there are fewer.
        seed: Draws them.

    Raises:
        DataError: The folder is missing, cannot be read, or has too few images; an image is broken.
    """
    if not os.path.isdir(folder):
        raise _no_images(folder, "is no folder")
    below = images_below(folder)
    left_out = f" (left out: {left_out_in_words(below.left_out)})" if below.left_out else ""
    names = sorted(Path(path).relative_to(folder).as_posix() for path in below.paths)
    if not names:
        raise _no_images(folder, f"holds no image{left_out}")
    chosen = draw_indices(len(names), count, seed, f"the folder {folder}")
    pixels = np.stack([to_array(folder / names[index], preprocess) for index in chosen])
    return Calibration(pixels, f"folder {folder.resolve().name}{left_out}", seed)


def _no_images(folder: Path, reason: str) -> DataError:
    return DataError(
        f"The calibration folder {folder} {reason}; files that end in {', '.join(SUFFIXES)} are looked for, "
        "also in the folders in it. Name another with --calibration FOLDER, or leave it out for training images."
    )


def draw_indices(available: int, count: int | None, seed: int, source: str) -> npt.NDArray[np.int64]:
    """Positions of the images to calibrate on, in rising order.

    Raises:
        DataError: More are asked for than there are.
    """
    if count is not None and count > available:
        raise DataError(
            f"--calibration-count {count} is more than the {available} images of {source}. Ask for at most "
            f"{available}, or give more images."
        )
    wanted = min(available, COUNT) if count is None else count
    # Drawn by permuting all, so that more images of one seed are the fewer ones and others; sorted, so that files are
    # read in the order in which they lie.
    return np.sort(np.random.default_rng(seed).permutation(available)[:wanted]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class PrecisionJob:
    """A conversion to a lower precision: its options with the images that they need.

    Attributes:
        options: What is asked for.
        held_out: Batches of images uint8 [n, H, W, C] and labels [n] (-1: unknown) to judge on; neither calibrated on
            nor test images, because limits and kept layers are chosen by them.
        held_out_source: Where they come from, for the report.
        calibration: For int8 and fp8.
    """

    options: PrecisionOptions
    held_out: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    held_out_source: str
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.options.precision in QUANTISED and self.calibration is None:
            raise UsageError(f"--precision {self.options.precision} needs images to calibrate on. Give a folder.")

    def inputs(self, preprocess: Preprocess) -> npt.NDArray[Any] | None:
        """Images to calibrate on, as a graph of this pre-processing takes them; None where none are needed."""
        return None if self.calibration is None else as_input(self.calibration.images_NHWC, preprocess)

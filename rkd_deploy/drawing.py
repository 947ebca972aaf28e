"""Which images of a data set a lower precision is calibrated on and judged on. Never the test images.

Letters: N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.card import Preprocess
from rkd_deploy.data.sources import AnySplit, ImageSet
from rkd_deploy.export.calibration import Calibration, draw, from_folder
from rkd_deploy.export.precision import QUANTISED, Lowering, PrecisionOptions
from rkd_deploy.train.evaluation import batch_of

CHUNK = 256
HELD_OUT = 2000
"""Images to judge on, at most: one of them is 0.05 points."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Batches:
    """A split chunk by chunk, as backends take it, as often as it is asked for."""

    split: AnySplit

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Images uint8 [n, H, W, C] and labels [n]."""
        labels_N, done = self.split.labels_N.numpy(), 0
        for images_NCHW in self.split.chunks(min(CHUNK, batch_of(self.split.image_size))):
            yield images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels_N[done : done + len(images_NCHW)]
            done += len(images_NCHW)


def draw_lowering(images: ImageSet, options: PrecisionOptions, preprocess: Preprocess) -> Lowering:
    """Calibrate on a folder or on training images; judge on validation images, or on other training images.

    Args:
        images: The run's data set.
        options: What is asked for.
        preprocess: The model's rule, for a folder.

    Raises:
        DataError: The folder or the data set has too few images.
    """
    train = f"{images.name} training images"
    calibration, taken_N = None, np.empty(0, np.int64)
    if options.precision in QUANTISED and options.calibration is not None:
        calibration = from_folder(options.calibration, preprocess, options.count, options.seed)
    elif options.precision in QUANTISED:
        taken_N = draw(len(images.train), options.count, options.seed, train)
        pixels_NHWC = np.concatenate([pixels for pixels, _ in Batches(images.train.take(_places(taken_N)))])
        calibration = Calibration(pixels_NHWC, train, options.seed)
    if len(images.val):
        pool, left_N, source = images.val, np.arange(len(images.val)), f"{images.name} validation images"
    else:
        pool, left_N = images.train, np.setdiff1d(np.arange(len(images.train)), taken_N)
        source = f"{train} not calibrated on"
    chosen_N = np.sort(np.random.default_rng(options.seed + 1).permutation(left_N)[:HELD_OUT])
    held_out = Batches(pool.take(_places(chosen_N)))
    return Lowering(options=options, held_out=held_out, held_out_source=source, calibration=calibration)


def _places(index_N: npt.NDArray[np.int64]) -> Any:
    import torch

    return torch.from_numpy(index_N)

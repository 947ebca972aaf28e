"""Draws the photo that a bundle is proven with from its bytes on, and writes it with the logits it must get.

golden.npz begins behind the pre-processing, where most deployments go wrong. golden/photo.jpg begins before it: every
app and server that runs a bundle can be held against golden/photo.json.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.bench.parity import GOLDEN_PHOTO, PHOTO_LOGITS, PhotoAnswer
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.images import as_input, to_array
from rkd_deploy.storage import write_bytes, write_json

_LEAST_SIDE = 240
"""Pixels: the photo of a network for tiny images is shrunk as much as a real one would be."""


def draw_photo(preprocess: Preprocess) -> bytes:
    """A landscape as JPEG, larger than what the model takes and of another shape; the same bytes for the same rule.

    Each way to get the pre-processing wrong changes the result: left is not right and up not down (crop, orientation),
    red is not blue (colour order), and stripes as fine as a pixel turn into moire unless they are averaged.
    """
    from PIL import Image

    high, wide = preprocess.resize_to
    height, width = max(_LEAST_SIDE, 5 * high // 4), max(3 * _LEAST_SIDE // 2, 5 * wide // 3)
    y, x = np.mgrid[0:height, 0:width]
    v, u = y / height, x / width
    picture = np.stack([90 + 110 * v, 140 + 70 * v, 235 - 40 * v], axis=2)  # the sky, paler below
    picture[np.hypot(x - 0.62 * width, y - 0.25 * height) < 0.15 * height] = 250, 205, 70
    stripes = 64.0 * (((x + y) // 2) % 2)
    for base, swing, colour, ploughed in ((0.55, 0.10, (70, 105, 60), 0), (0.72, 0.06, (95, 55, 25), 1)):
        hill = v > base + swing * np.sin(7 * u + 9 * base) - 0.12 * u
        picture[hill] = np.array(colour) + ploughed * stripes[hill, np.newaxis]
    fence = (v > 0.6) & (u < 0.45) & (x % 9 < 3)
    picture[fence] = 235, 230, 220
    buffer = io.BytesIO()
    # Without subsampling of colours: libraries enlarge those differently, and that is not what is tested.
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=75, subsampling=0)
    return buffer.getvalue()


def write_photo(
    folder: Path, card: ModelCard, infer: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], tolerance: float
) -> None:
    """Write the photo of a bundle, and what must be answered: logits, their tolerance, the best class.

    Args:
        folder: Of the bundle.
        card: Its card.
        infer: The logits [N, K] of what the graph takes, by the same network as those in golden.npz.
        tolerance: Largest difference of a logit.
    """
    photo = folder / GOLDEN_PHOTO
    photo.parent.mkdir()
    write_bytes(photo, draw_photo(card.preprocess))
    logits_K = infer(as_input(to_array(photo, card.preprocess)[np.newaxis], card.preprocess))[0].astype(np.float64)
    exponentials_K = np.exp(logits_K - logits_K.max())
    best = int(logits_K.argmax())
    answer = PhotoAnswer(
        logits=tuple(logits_K.tolist()),
        tolerance=tolerance,
        label=card.labels[best],
        index=best,
        probability=float(exponentials_K[best] / exponentials_K.sum()),
    )
    write_json(folder / PHOTO_LOGITS, asdict(answer))

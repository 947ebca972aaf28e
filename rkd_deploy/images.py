"""Makes of a file, a PIL image or an array what a model takes, by `card.Preprocess`.

Letters: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import DataError
from rkd_deploy.image_folders import FORMATS_IN_WORDS, IMAGE_FORMATS
from rkd_deploy.storage import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageLike: TypeAlias = "str | os.PathLike[str] | Pixels | PilImage"

FILE_LIMIT = 2**30
"""Bytes of the largest image file that is opened."""

_WAY_OUT = f"Give a {FORMATS_IN_WORDS} file with 8 bits per channel that an image viewer opens."
_UINT8 = np.dtype(np.uint8)
_DEEP_MODES = ("I", "F")
_ENLARGED = 2**25
"""Pixels up to which a whole image is enlarged before it is cropped, however small it was; 100 MB."""
_BITS_PER_SAMPLE = 258  # TIFF's tag


def to_array(image: ImageLike, preprocess: Preprocess) -> Pixels:
    """One image as pixels of the model's size.

    The image is turned upright (EXIF), converted to RGB (to grey where the model has one channel; transparency is
    dropped), resized with anti-aliasing until its crop fits, shorter side first, and cropped at the centre.
    An array of the right type and size is taken for one that is cropped already: it is given back as it is, uncopied.

    Args:
        image: Path, PIL image, or uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        preprocess: The model's rule.

    Returns:
        uint8 [H, W, C] of the model's height, width and channels.

    Raises:
        DataError: The image is missing, broken, no image, too large, or not 8 bits per channel.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, preprocess)
    if isinstance(image, str | os.PathLike):
        return fitted(decoded(image, os.fspath(image), preprocess.channels), preprocess)
    # A PIL image can only exist where PIL is imported: an app that feeds arrays never loads it.
    pil = sys.modules.get("PIL.Image")
    if pil is None or not isinstance(image, pil.Image):
        raise DataError(
            f"An image was given as {type(image).__name__}; it must be a path, a PIL image, "
            "or a uint8 NumPy array [H, W, 3]."
        )
    try:
        return fitted(_upright(image, preprocess.channels), preprocess)
    except DataError:
        raise
    except Exception as error:  # it is decoded only now
        raise DataError(f"The PIL image given cannot be read: {_reason(error)}. {_WAY_OUT}") from error


def normalise(batch_NHWC: Pixels, preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """Pixels as the input of a model whose graph does not normalise by itself.

    Args:
        batch_NHWC: uint8 [N, H, W, C].
        preprocess: Gives mean and standard deviation per channel, in units of [0, 1].

    Returns:
        float32 [N, C, H, W], (pixel / 255 - mean) / std.
    """
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    scaled = (batch_NHWC.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def as_input(batch_NHWC: Pixels, preprocess: Preprocess) -> Pixels | npt.NDArray[np.float32]:
    """Pixels as a model takes them: as they are where its graph normalises by itself, else normalised here."""
    return batch_NHWC if preprocess.embedded else normalise(batch_NHWC, preprocess)


def _from_array(array: npt.NDArray[np.generic], preprocess: Preprocess) -> Pixels:
    shape = (preprocess.height, preprocess.width, len(preprocess.mean))
    if array.dtype != _UINT8:
        raise DataError(
            f"An image array is {array.dtype}; it must be uint8, pixels from 0 to 255. "
            "Scale it first: a float image in [0, 1] by 255, a 16-bit image by 1/257."
        )
    if array.shape == shape:
        return array  # type: ignore[return-value]  # uint8, as was just seen
    pixels = array[:, :, np.newaxis] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise DataError(
            f"An image array has shape {list(array.shape)}; it must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. "
            "Move the channels last with array.transpose(1, 2, 0); give a batch to predict_batch."
        )
    if pixels.shape[2] == 4:
        pixels = pixels[:, :, :3]
    if pixels.shape[2] == 1 and shape[2] == 3:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape == shape:
        return np.ascontiguousarray(pixels)
    from PIL import Image

    grey = pixels.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if grey else pixels))
    return fitted(_upright(picture, preprocess.channels), preprocess)


def decoded(
    source: str | os.PathLike[str] | IO[bytes], name: str, channels: int = 3, *, max_pixels: int | None = None
) -> PilImage:
    """A whole image file, upright by its EXIF orientation, as RGB; as grey where there is one channel.

    Args:
        source: Path, or the file's bytes as a stream.
        name: What messages call it.
        channels: 3 or 1.
        max_pixels: Width times height, by the file's header, up to which an image is decoded. Default: what Pillow
            warns of, PIL.Image.MAX_IMAGE_PIXELS.

    Raises:
        DataError: The file is missing, broken, no image, too large, or not 8 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with ExitStack() as opened:
            if isinstance(source, str | os.PathLike):
                source = opened.enter_context(open_regular(source, limit=FILE_LIMIT))
            # Without a list Pillow tries all formats it knows, and starts Ghostscript for an EPS, whatever its suffix.
            try:
                image = opened.enter_context(Image.open(source, formats=tuple(IMAGE_FORMATS)))
            except UnidentifiedImageError as error:
                source.seek(0)
                raise OSError(_content(source)) from error
            return _upright(image, channels, max_pixels)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except OSError as error:
        # What the system says of a file has its own way out; what a decoder says has none, and no number.
        way_out = "" if error.errno is not None else f" {_WAY_OUT}"
        raise DataError(f"{name} cannot be read as an image: {_reason(error)}.{way_out}") from error
    except Exception as error:  # what Pillow's decoders raise on broken files is of any type
        raise DataError(f"{name} cannot be read as an image: {_reason(error)}. {_WAY_OUT}") from error


def _upright(image: PilImage, channels: int, max_pixels: int | None = None) -> PilImage:
    from PIL import Image, ImageOps

    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if limit is not None and image.width * image.height > limit:
        raise DataError(
            f"The image has {image.width} x {image.height} pixels, more than the {limit:,} that are decoded "
            "(a decompression bomb would fill the memory). Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    if (depth := _bits_per_channel(image)) > 8:
        raise DataError(
            f"The image has mode {image.mode!r} and {depth} bits, more than 8 bits per channel, and pixels must be "
            "uint8. Convert it first, for example with: convert IN -depth 8 OUT.png"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # PIL warns where a palette's transparency is dropped in one step
    return upright.convert("L" if channels == 1 else "RGB")


def _bits_per_channel(image: PilImage) -> int:
    """Bits of a channel in the file: Pillow gives colours of 16 bits the mode of those of 8, and misreads some."""
    if image.mode.split(";")[0] in _DEEP_MODES:
        return 32 if image.mode in _DEEP_MODES else 16
    bits = [8]
    if image.format == "TIFF":
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        bits += tags.get(_BITS_PER_SAMPLE, (8,))
    for tile in getattr(image, "tile", []):  # how the decoder is to read the file; gone once it has
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if image.format == "PNG" and ";16" in str(arguments[0]):
            bits.append(16)
        if image.format == "PPM" and len(arguments) > 1 and isinstance(arguments[1], int):
            bits.append(arguments[1].bit_length())  # of the largest value
    return max(bits)


def fitted(colour: PilImage, preprocess: Preprocess) -> Pixels:
    """An upright image, resized and cropped by the model's rule: uint8 [H, W, C]."""
    from PIL import Image

    size = _resized(colour.size, preprocess)
    resampling = Image.Resampling[preprocess.interpolation.upper()]
    left = round((size[0] - preprocess.width) / 2)
    top = round((size[1] - preprocess.height) / 2)
    box = (left, top, left + preprocess.width, top + preprocess.height)
    if size[0] * size[1] > max(_ENLARGED, colour.width * colour.height):
        # A strip of 60,000 x 1 pixels would become one of 13 million x 224: only what is in the crop is enlarged.
        across, down = colour.width / size[0], colour.height / size[1]
        source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        cropped = colour.resize((preprocess.width, preprocess.height), resampling, box=source)
    else:
        cropped = (colour.resize(size, resampling) if size != colour.size else colour).crop(box)
    pixels = np.asarray(cropped)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _resized(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height after resizing: one side exact, the other rounded down, as torchvision's Resize does."""
    width, height = size
    high, wide = preprocess.resize_to
    if width * high <= height * wide:
        return wide, max(high, int(wide * height / width))
    return max(wide, int(high * width / height)), high


_FOREIGN: Mapping[str, bytes] = {
    "it is a HEIC or AVIF image": rb".{4}ftyp",
    "it is a JPEG 2000 image": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "it is a web page": rb"\s*<(!doctype html|html)",
    "it is a PDF": rb"%PDF-",
    "it is an SVG or another XML file": rb"\s*<(svg|\?xml)",
}
"""How the content of files that often have an image's name and are none begins."""


def _content(stream: IO[bytes]) -> str:
    """What a file holds in place of an image, in words."""
    head = stream.read(64)
    if not head:
        return "it is empty"
    kinds = (kind for kind, beginning in _FOREIGN.items() if re.match(beginning, head, re.IGNORECASE | re.DOTALL))
    return next(kinds, "its content is in no image format")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__

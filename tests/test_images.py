import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from rkd_deploy import images
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import DataError
from rkd_deploy.images import normalise, to_array

STATS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


def rule(height=8, width=8, **options):
    return Preprocess(height=height, width=width, **(STATS | options))


def noise(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def test_an_array_of_the_right_size_is_passed_through_uncopied():
    for x in (noise(8, 8, 3), noise(8, 16, 3)[:, ::2], noise(8, 8, 3)[::-1]):
        assert to_array(x, rule()) is x


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (31, 17), (7, 5), (100, 3)])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_resizing_and_cropping_equal_torchvisions(interpolation, size, crop_fraction):
    from torchvision.transforms import v2

    image = Image.fromarray(noise(*size, 3))
    resize = v2.Resize(round(8 / crop_fraction), v2.InterpolationMode(interpolation), antialias=True)
    expected = np.asarray(v2.CenterCrop(8)(resize(image)))
    actual = to_array(image, rule(interpolation=interpolation, crop_fraction=crop_fraction))
    np.testing.assert_array_equal(actual, expected)


def test_an_oblong_input_is_covered_and_never_padded():
    white = np.full((10, 10, 3), 255, np.uint8)
    for height, width in ((4, 9), (9, 4)):
        assert to_array(white, rule(height, width)).shape == (height, width, 3)
        assert to_array(white, rule(height, width)).min() == 255


def test_a_file_a_path_and_an_image_are_one(tmp_path):
    x = noise(8, 8, 3)
    Image.fromarray(x).save(tmp_path / "x.png")
    for image in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(x)):
        np.testing.assert_array_equal(to_array(image, rule()), x)


def test_grey_and_transparent_arrays_become_rgb():
    grey, rgba = noise(8, 8), noise(8, 8, 4)
    for x in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(to_array(x, rule()), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(to_array(rgba, rule()), rgba[:, :, :3])


def test_a_one_channel_model_gets_grey():
    one_channel = rule(mean=(0.5,), std=(0.5,))
    grey = noise(8, 8)
    np.testing.assert_array_equal(to_array(grey, one_channel), grey[:, :, None])
    luma = (noise(8, 8, 3).astype(float) @ [0.299, 0.587, 0.114])[:, :, None]  # ITU-R BT.601
    assert np.abs(to_array(noise(8, 8, 3), one_channel) - luma).max() <= 1
    assert to_array(noise(20, 30), one_channel).shape == (8, 8, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.fromarray(noise(12, 9, 3)).convert(mode)
    assert to_array(image, rule()).shape == (8, 8, 3)


def test_a_palette_with_transparency_does_not_warn(tmp_path):
    image = Image.fromarray(noise(8, 8, 3)).quantize(16)
    image.save(tmp_path / "x.png", transparency=bytes([0, 128, 255]))
    assert to_array(tmp_path / "x.png", rule()).shape == (8, 8, 3)


def test_exif_orientation_is_respected(tmp_path):
    x = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns the picture by 90 degrees clockwise
    Image.fromarray(x).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(to_array(tmp_path / "x.png", rule()), np.rot90(x, k=-1))


def test_broken_files_name_the_path_the_reason_and_the_way_out(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    stream = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(stream, "PNG")
    png = stream.getvalue()
    broken = bytearray(png)
    broken[60:70] = b"\0" * 10
    contents = {
        "empty.png": b"",
        "text.jpg": b"this is no image" * 10,
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "broken.png": bytes(broken),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as an image: .+Give a JPEG") as caught:
            to_array(tmp_path / name, rule())
        assert str(tmp_path / name) in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.png cannot be read as an image: No such file"):
        to_array(tmp_path / "no.png", rule())
    with pytest.raises(DataError, match="it is a folder, and must be a regular file"):
        to_array(str(tmp_path), rule())
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="it is a named pipe, and must be a regular file"):
        to_array(tmp_path / "pipe.jpg", rule())
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="it is a device, and must be a regular file"):
        to_array(tmp_path / "endless.jpg", rule())


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.fromarray(noise(64, 64)).save(tmp_path / "x.png")
    for limit in (64 * 64 - 1, 100):  # PIL itself warns from the limit on, and raises from twice the limit on
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"x\.png.*(decompression bomb|exceeds limit)"):
            to_array(tmp_path / "x.png", rule())
    with pytest.raises(DataError, match="64 x 64 pixels"):
        to_array(Image.fromarray(noise(64, 64)), rule())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert to_array(tmp_path / "x.png", rule()).shape == (8, 8, 3)


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64", "int64", "bool"])
def test_arrays_of_other_types_are_named(dtype):
    with pytest.raises(DataError, match=f"is {dtype}; it must be uint8"):
        to_array(np.zeros((8, 8, 3), dtype), rule())


def test_16_bit_and_float_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        with pytest.raises(DataError, match=f"{name}: .*more than 8 bits"):
            to_array(tmp_path / name, rule())


def png16(channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write: 2 grey, 3 RGB or 4 RGBA channels."""
    kind, rows = {2: 4, 3: 2, 4: 6}[channels], b"".join(b"\0" + bytes(8 * 2 * channels) for _ in range(8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16() -> bytes:
    """A TIFF of 16 bits a channel in colour: a header, its pixels, and nine tags (number, type, count, value)."""
    pixels = bytes(8 * 8 * 3 * 2)
    bits = 8 + len(pixels)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(pixels))]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits + 6) + pixels + struct.pack("<3H", 16, 16, 16) + table


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey_alpha.png", png16(2)),
        ("rgb.png", png16(3)),
        ("rgba.png", png16(4)),
        ("rgb.tiff", tiff16()),
        ("rgb.ppm", b"P6 8 8 65535\n" + bytes(8 * 8 * 3 * 2)),
        ("plain.ppm", b"P3 1 1 1023\n 1 2 3\n"),
    ],
)
def test_16_bit_colours_are_refused_by_the_file_although_pillow_calls_them_rgb(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with Image.open(tmp_path / name) as opened:
        assert opened.mode in ("LA", "RGB", "RGBA")
        with pytest.raises(DataError, match="more than 8 bits per channel"):
            to_array(opened, rule())
    with pytest.raises(DataError, match=f"{name}: .*(16|10) bits, more than 8 bits per channel"):
        to_array(tmp_path / name, rule())


def test_only_formats_that_the_message_names_are_tried(tmp_path, monkeypatch):
    """An EPS called .jpg would start Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"its content is in no image format.*JPEG, PNG, BMP, WebP, TIFF, GIF or PPM"):
        to_array(tmp_path / "x.jpg", rule())


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_strip_is_cropped_before_it_is_enlarged(size):
    """60,000 x 1 pixels would become 13 million x 224: 9 GB."""
    strip = np.repeat(np.arange(60_000) // 235, 3).astype(np.uint8).reshape(*size, 3)
    tracemalloc.start()
    actual = to_array(Image.fromarray(strip), rule(224, 224))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert actual.shape == (224, 224, 3)
    assert np.abs(actual.astype(int) - strip.reshape(-1, 3)[30_000].astype(int)).max() <= 1  # its centre, one pixel
    assert peak < 2**20


def test_cropping_first_gives_what_enlarging_first_gives(monkeypatch):
    strip = Image.fromarray(noise(3, 100, 3))
    enlarged_first = to_array(strip, rule(30, 20))
    monkeypatch.setattr(images, "_ENLARGED", 0)
    cropped_first = to_array(strip, rule(30, 20))
    assert np.abs(enlarged_first.astype(int) - cropped_first).max() <= 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (8,), (1, 8, 8, 3), (8, 8, 2), (0, 8, 3)])
def test_arrays_of_other_shapes_are_named(shape):
    with pytest.raises(DataError, match=r"has shape \[.*it must be \[H, W\]"):
        to_array(np.zeros(shape, np.uint8), rule())


def test_other_types_are_named():
    for image in (3, [1, 2], None, b"bytes"):
        with pytest.raises(DataError, match=f"given as {type(image).__name__}"):
            to_array(image, rule())


def test_normalise_is_the_cards_formula():
    x = noise(2, 5, 4, 3)
    expected = np.empty((2, 3, 5, 4))
    for channel in range(3):
        expected[:, channel] = (x[..., channel] / 255 - STATS["mean"][channel]) / STATS["std"][channel]
    actual = normalise(x, rule(5, 4))
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_arrays_of_the_right_size_need_no_pillow():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import numpy as np\n"
        "from rkd_deploy.card import Preprocess\n"
        "from rkd_deploy.images import to_array\n"
        "p = Preprocess(height=2, width=2, mean=(0.,) * 3, std=(1.,) * 3)\n"
        "for shape in ((2, 2, 3), (2, 2), (2, 2, 1), (2, 2, 4)):\n"
        "    assert to_array(np.zeros(shape, np.uint8), p).shape == (2, 2, 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\0\0\0\x18ftypheic", "it is a HEIC or AVIF image"),
        (b"\0\0\0\x0cjP  \r\n", "it is a JPEG 2000 image"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"%PDF-1.7", "it is a PDF"),
        (b"<svg xmlns=", "it is an SVG"),
        (b"\x89HDF", "its content is in no image format"),
    ],
)
def test_what_has_an_images_name_and_is_none_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "photo.jpg").write_bytes(content)
    rule = Preprocess(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(DataError, match=rf"photo\.jpg cannot be read as an image: {words}.*\. Give a JPEG"):
        to_array(tmp_path / "photo.jpg", rule)

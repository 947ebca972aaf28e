"""Broken and odd image files, as they are found in the wild."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rkd_deploy.data import files
from rkd_deploy.data.files import ImageFiles, find_broken, map_in_threads, read_image, refuse_broken
from rkd_deploy.data.sources import load_images
from rkd_deploy.errors import DataError
from rkd_deploy.recipe import DataRecipe


def truncated(path: Path, photo: Path) -> None:
    path.write_bytes(photo.read_bytes()[:-2000])


def empty(path: Path, photo: Path) -> None:
    path.write_bytes(b"")


def text(path: Path, photo: Path) -> None:
    path.write_text("404 not found")


def deep(path: Path, photo: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path, format="PNG")


def dangling(path: Path, photo: Path) -> None:
    path.symlink_to("absent.jpg")


def pipe(path: Path, photo: Path) -> None:
    os.mkfifo(path)


BROKEN: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated.jpg": (truncated, "cannot be read as an image: .*truncated"),
    "empty.jpg": (empty, "cannot be read as an image: it is empty"),
    "text.jpg": (text, "its content is in no image format"),
    "dangling.jpg": (dangling, "cannot be opened: it is a link to absent.jpg, which is not there"),
    "pipe.jpg": (pipe, "cannot be opened: it is a named pipe"),
    "deep.png": (deep, "more than 8 bits per channel"),
}


@pytest.fixture
def photo(photos: Path) -> Path:
    return sorted((photos / "train" / "n01440764").iterdir())[0]


def set_of(photos: Path, **changes: Any) -> DataRecipe:
    how: dict[str, Any] = {"image_size": 8, "val_fraction": 0, "workers": 1}
    return DataRecipe(name="imagefolder", root=str(photos), **(how | changes))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, photo: Path, name: str) -> None:
    make, reason = BROKEN[name]
    make(tmp_path / name, photo)
    with pytest.raises(DataError, match=rf"{name}.*{reason}"):
        read_image(ImageFiles([str(tmp_path / name)]), 0)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_all_broken_files_are_listed_at_once_and_skipped_only_when_asked(
    photos: Path, photo: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (make, _) in BROKEN.items():
        make(photo.parent / name, photo)
    with pytest.raises(DataError) as caught:
        load_images(set_of(photos, cache=cache), 0)
    message = str(caught.value)
    assert message.startswith("6 of 30 images cannot be read:")
    assert all(str(photo.parent / name) in message for name in BROKEN)
    assert message.endswith("--set data.broken=skip")
    images = load_images(set_of(photos, cache=cache, broken="skip"), 0)
    assert (len(images.train), len(images.test), len(images.skipped)) == (18, 6, 6)
    assert sum(name in line for line in images.skipped for name in BROKEN) == 6
    assert images.train.labels_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    monkeypatch.setattr(files, "LISTED", 3)
    with pytest.raises(DataError, match=r"\.\.\. and 3 more"):
        load_images(set_of(photos, cache=cache), 0)


def test_odd_files_are_what_a_viewer_shows(tmp_path: Path, photo: Path) -> None:
    """Grey, palette with alpha, CMYK, turned by EXIF: RGB, upright, transparency dropped, as served models see it."""
    with Image.open(photo) as opened:
        rgb = opened.convert("RGB").resize((30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise to show it
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("RGBA").quantize(64).save(tmp_path / "palette.png", transparency=0)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    rgb.save(tmp_path / "turned.png", exif=exif)
    pictures = {path.stem: read_image(ImageFiles([str(path)]), 0) for path in tmp_path.glob("*.*g")}
    assert {name: image.mode for name, image in pictures.items()} == dict.fromkeys(pictures, "RGB")
    assert np.array_equal(pictures["grey"], rgb.convert("L").convert("RGB"))
    assert np.array_equal(pictures["turned"], rgb.transpose(Image.Transpose.ROTATE_270))
    assert not np.array_equal(ImageOps.exif_transpose(rgb), pictures["turned"])
    assert pictures["palette"].size == rgb.size
    difference = np.abs(np.asarray(pictures["cmyk"], float) - np.asarray(rgb, float)).mean()
    assert difference < 5


def test_what_was_found_is_remembered_until_a_file_changes(tmp_path: Path, photo: Path) -> None:
    bad, good = tmp_path / "bad.jpg", tmp_path / "good.jpg"
    truncated(bad, photo)
    good.write_bytes(photo.read_bytes())
    files = ImageFiles([str(good), str(bad)])
    first = find_broken(files, [0, 1], 1, tmp_path)
    assert list(first) == [1]
    cached = next((tmp_path / "remembered").iterdir())
    assert json.loads(cached.read_text()) == {"1": first[1]}
    cached.write_text("{}")
    assert find_broken(files, [0, 1], 1, tmp_path) == {}  # it was not decoded again
    assert find_broken(files, [1], 1, tmp_path) == first  # another question
    bad.write_bytes(photo.read_bytes())
    empty(good, photo)
    assert list(find_broken(files, [0, 1], 1, tmp_path)) == [0]


def test_nothing_broken_is_no_error() -> None:
    refuse_broken([], 10, "stop")
    refuse_broken(["a.jpg is broken"], 10, "skip")


def test_results_come_in_order_beyond_what_is_done_at_once() -> None:
    assert list(map_in_threads(lambda n: n * n, range(1300), 3, "Squared")) == [n * n for n in range(1300)]


def test_a_class_that_loses_all_its_images_is_named(photos: Path, photo: Path) -> None:
    for path in photo.parent.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"No training image is left of 1 of 3 classes \(n01440764\)"):
        load_images(set_of(photos, broken="skip"), 0)


def test_decoding_is_that_of_served_models(photos: Path, photo: Path) -> None:
    from rkd_deploy.card import Preprocess
    from rkd_deploy.images import to_array

    images = load_images(set_of(photos, image_size=20, crop_fraction=0.8), 0)
    rule = Preprocess(height=20, width=20, mean=images.mean, std=images.std, crop_fraction=images.crop_fraction)
    served = torch.from_numpy(to_array(photo, rule).copy()).permute(2, 0, 1)
    assert torch.equal(images.train.images_NCHW[0], served)  # type: ignore[union-attr]

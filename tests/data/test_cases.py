"""Folders of the kinds that people have, each with the right answer of training, calibration and a bench's accuracy."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_deploy.bench.accuracy import labelled_images
from rkd_deploy.card import Preprocess
from rkd_deploy.data.sources import load_images
from rkd_deploy.errors import DataError, RkdError
from rkd_deploy.export.precision.images import calibration_from_folder
from rkd_deploy.images import to_array
from rkd_deploy.recipe import DataRecipe
from rkd_deploy.serve.classifier import load
from rkd_deploy.train.checkpoints import load_checkpoint

CLASSES = ("ant", "bee", "cat")
EACH = 6
RULE = Preprocess(height=32, width=32, mean=(0.0,) * 3, std=(1.0,) * 3)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, six JPEGs each."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(EACH):
            pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


def plain(folder: Path, photos: Path) -> None:
    shutil.copytree(photos, folder, dirs_exist_ok=True)


def splits(folder: Path, photos: Path) -> None:
    for name in ("Training", "Testing"):
        shutil.copytree(photos, folder / name)


def loop(folder: Path, photos: Path) -> None:
    plain(folder, photos)
    (folder / "ant" / "latest").symlink_to(".")


def dangling(folder: Path, photos: Path) -> None:
    plain(folder, photos)
    (folder / "ant" / "zzz.jpg").symlink_to("absent.jpg")


def mac(folder: Path, photos: Path) -> None:
    plain(folder, photos)
    (folder / "ant" / "._photo.jpg").write_bytes(b"\0\5\x16\7")
    shutil.copytree(photos / "ant", folder / "__MACOSX" / "ant")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def thin(folder: Path, photos: Path) -> None:
    plain(folder, photos)
    Image.new("L", (60_000, 1), 128).save(folder / "ant" / "thin.png")


def deep(folder: Path, photos: Path) -> None:
    """A PNG of 16 bits a channel in colour, which Pillow reads as 8 bits and cannot write."""
    plain(folder, photos)
    y, x = np.mgrid[:48, :48]
    pixels = np.stack([x * 1365, y * 1365, (x + y) * 682], -1).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head, rows = struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0), b"".join(b"\0" + row.tobytes() for row in pixels)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "ant" / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def single(folder: Path, photos: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        shutil.copy(photos / name / "0.jpg", folder / name)


def kinds(folder: Path, photos: Path) -> None:
    plain(folder, photos)
    for suffix in ("gif", "tiff", "jfif"):
        with Image.open(photos / "ant" / "0.jpg") as image:
            image.save(folder / "ant" / f"more.{suffix}", format="JPEG" if suffix == "jfif" else None)
    (folder / "ant" / "more.avif").write_bytes(b"")


ALL = len(CLASSES) * EACH
ONE_BROKEN = rf"1 of {ALL + 1} images cannot be read"
# Images of training, of a bench and of calibration; a text: the error.
CASES: dict[Callable[[Path, Path], None], tuple[int | str, int | str, int | str]] = {
    plain: (ALL, ALL, ALL),
    splits: (2 * ALL, "holds splits: Testing, Training. Name one of them", 2 * ALL),
    loop: (*("latest is a link to a folder that is read as .*ant already",) * 3,),
    dangling: (
        rf"{ONE_BROKEN}:\s.*zzz\.jpg .*a link to absent\.jpg, which is not there",
        ALL + 1,
        "which is not there",
    ),
    mac: (ALL, ALL, ALL),
    thin: (ALL + 1, ALL + 1, ALL + 1),
    deep: (rf"{ONE_BROKEN}:\s.*deep\.png: .* 16 bits", ALL + 1, "16 bits"),
    single: ("No image is left to test on: 3 images of 3 classes", 3, "too few to calibrate on"),
    kinds: (ALL + 3, ALL + 3, ALL + 3),
}


def of_training(folder: Path) -> int:
    data = DataRecipe(name="imagefolder", root=str(folder), image_size=32, workers=1)
    images = load_images(data, 0)
    assert images.classes == CLASSES
    assert images.sources.get("left out") == ("1 .avif" if folder.name == "kinds" else None)
    return len(images.train) + len(images.val) + len(images.test)


def of_a_bench(folder: Path) -> int:
    return len(labelled_images(folder, CLASSES)[0])


def of_calibration(folder: Path) -> int:
    images = calibration_from_folder(folder, RULE).images_NHWC
    assert images.shape[1:] == (32, 32, 3)
    return len(images)


@pytest.mark.parametrize("use", [of_training, of_a_bench, of_calibration])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_has_the_same_images_for_every_use(
    case: Callable[[Path, Path], None],
    use: Callable[[Path], int],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # what is remembered of files is kept in the current folder
    case(folder := tmp_path / case.__name__, photos)
    expected = dict(zip((of_training, of_a_bench, of_calibration), CASES[case], strict=True))[use]
    if isinstance(expected, int):
        assert use(folder) == expected
        return
    with pytest.raises(DataError, match=expected):
        use(folder)


@pytest.mark.parametrize("case", [dangling, deep])
def test_what_is_broken_is_left_out_where_that_was_asked_for(
    case: Callable[[Path, Path], None], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case(folder := tmp_path / "images", photos)
    images = load_images(
        DataRecipe(name="imagefolder", root=str(folder), image_size=32, workers=1, broken="skip"), seed=0
    )
    assert (len(images.train) + len(images.val) + len(images.test), len(images.skipped)) == (ALL, 1)


@pytest.mark.parametrize(
    "name", ["10", " lead", "a b", "a,b", '"q"', "=1+1", "-x", "naïve", "猫", "cafe\u0301", "x" * 200]
)
def test_a_class_may_be_called_so(name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain(tmp_path / "photos", photos)
    (tmp_path / "photos" / "ant").rename(tmp_path / "photos" / name)
    images = load_images(DataRecipe(name="imagefolder", root="photos", image_size=32, workers=1), seed=0)
    assert images.classes == tuple(sorted(["bee", "cat", name]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"a\nb", "labels.txt, which is one label a line"),
        (b"a\x0bb", "labels.txt"),
        (b" ", "labels.txt"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_class_whose_name_is_no_line_is_refused_before_training(
    name: bytes, words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads labels.txt would give every class after it the name of another."""
    monkeypatch.chdir(tmp_path)
    plain(tmp_path / "photos", photos)
    (tmp_path / "photos" / "ant").rename(tmp_path / "photos" / os.fsdecode(name))
    with pytest.raises(DataError, match=rf"^The class .* {words}.* Rename its folder\."):
        load_images(DataRecipe(name="imagefolder", root="photos", image_size=32, workers=1), seed=0)


def test_a_strip_of_60_000_pixels_is_read_within_the_memory_of_a_photo(photos: Path, tmp_path: Path) -> None:
    thin(tmp_path, photos)
    assert (to_array(tmp_path / "ant" / "thin.png", RULE) == 128).all()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.onnx", load),
        ("weights.pth", load_checkpoint),
        ("weights.safetensors", load_checkpoint),
        ("photo.jpg", lambda path: to_array(path, RULE)),
    ],
)
def test_a_pointer_of_git_lfs_says_how_the_file_is_fetched(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(RkdError, match="it is a pointer of Git LFS instead of the file; fetch it with: git lfs pull"):
        read(tmp_path / name)

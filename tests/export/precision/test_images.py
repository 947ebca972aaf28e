"""Which images a precision is calibrated and judged on."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rkd_deploy.card import Preprocess
from rkd_deploy.data.sources import ImageSet, Split
from rkd_deploy.errors import DataError
from rkd_deploy.export.precision.images import Calibration, calibration_from_folder, draw_indices
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.pipeline import precision_job

PREPROCESS = Preprocess(height=4, width=4, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


@pytest.fixture
def folder(tmp_path):
    """40 images of one grey level each, in two folders."""
    for number in range(40):
        path = tmp_path / "photos" / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, number, number)).save(path)
    (tmp_path / "photos/notes.txt").write_text("no image")
    return tmp_path / "photos"


def greys(calibration):
    return calibration.images_NHWC[:, 0, 0, 0].tolist()


def test_a_folder_gives_the_images_that_its_seed_draws(folder):
    first, again = (calibration_from_folder(folder, PREPROCESS, 20, seed=3) for _ in range(2))
    other = calibration_from_folder(folder, PREPROCESS, 20, seed=4)
    assert first.images_NHWC.shape == (20, 4, 4, 3)
    assert len(set(greys(first))) == 20
    assert greys(first) == greys(again) != greys(other)
    assert first.sha256 == again.sha256 != other.sha256


def test_the_hash_is_of_shape_and_pixels(folder):
    actual = calibration_from_folder(folder, PREPROCESS)
    assert len(actual.images_NHWC) == 40
    assert actual.to_dict() == {
        "images": 40,
        "source": "folder photos (left out: 1 .txt)",
        "seed": 0,
        "sha256": hashlib.sha256(b"(40, 4, 4, 3)" + actual.images_NHWC.tobytes()).hexdigest(),
    }


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no image.+\.png.+--calibration FOLDER"):
        calibration_from_folder(tmp_path / "empty", PREPROCESS)
    with pytest.raises(DataError, match="is no folder"):
        calibration_from_folder(tmp_path / "missing", PREPROCESS)


@pytest.mark.parametrize("locked", ["", "inside"])
def test_a_folder_that_may_not_be_read_is_an_error_and_not_passed_over(request, locked):
    folder = Path(tempfile.mkdtemp(prefix="rkd-locked-"))  # not below pytest's own folders, which others may not enter
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0o755)
    (folder / "inside").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "seen.png")
    (folder / locked).chmod(0)
    was = os.geteuid()
    if was == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=rf"{folder.name} cannot be read: Permission denied.*{locked}.*Mend its"):
            calibration_from_folder(folder, PREPROCESS)
    finally:
        os.seteuid(was)
        (folder / locked).chmod(0o755)


def test_a_broken_image_is_named(folder):
    (folder / "odd/07.png").write_bytes(b"no png at all")
    with pytest.raises(DataError, match=r"07\.png cannot be read as an image"):
        calibration_from_folder(folder, PREPROCESS)


def test_too_few_images_are_refused(folder):
    with pytest.raises(DataError, match=r"--calibration-count 41 is more than the 40 images of the folder"):
        calibration_from_folder(folder, PREPROCESS, 41)
    with pytest.raises(DataError, match=r"8 images of folder photos .*are too few .+ at least 16"):
        calibration_from_folder(folder, PREPROCESS, 8)


def test_by_default_256_are_drawn_or_all_where_there_are_fewer():
    assert len(draw_indices(1000, None, 0, "x")) == 256
    assert draw_indices(100, None, 0, "x").tolist() == list(range(100))


def image_set(train, val):
    """Every image has a number, in its pixels and as its label: training from 0, validation from 100, test 200."""

    def split(first, count):
        labels_N = torch.arange(first, first + count)
        pixels = labels_N.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
        return Split(images_NCHW=pixels, labels_N=labels_N)

    names = tuple(str(number) for number in range(250))
    mean = (0.5, 0.5, 0.5)
    parts = {"train": split(0, train), "val": split(100, val), "test": split(200, 30)}
    return ImageSet(name="numbers", classes=names, mean=mean, std=mean, **parts)


@pytest.mark.parametrize("val", [0, 20])
def test_calibrated_judged_and_tested_on_three_sets_without_a_common_image(val):
    options = PrecisionOptions(precision="int8", count=40)
    job = precision_job(image_set(90, val), options, PREPROCESS)
    held_out = np.concatenate([labels_n for _, labels_n in job.held_out])
    pixels = np.concatenate([images_NHWC[:, 0, 0, 0] for images_NHWC, _ in job.held_out])
    assert held_out.tolist() == pixels.tolist()  # an image keeps its label
    assert len(greys(job.calibration)) == 40
    assert max(greys(job.calibration)) < 90
    if val:
        assert sorted(held_out) == list(range(100, 120))
        assert job.held_out_source == "numbers validation images"
    else:
        assert sorted([*held_out, *greys(job.calibration)]) == list(range(90))
        assert job.held_out_source == "numbers training images not calibrated on"


def test_a_folder_takes_the_place_of_training_images(folder):
    options = PrecisionOptions(precision="int8", calibration=folder)
    job = precision_job(image_set(90, 0), options, PREPROCESS)
    assert job.calibration.source == "folder photos (left out: 1 .txt)"
    assert sum(len(labels_n) for _, labels_n in job.held_out) == 90


def test_16_bit_floats_calibrate_nothing():
    assert precision_job(image_set(90, 20), PrecisionOptions(precision="fp16"), PREPROCESS).calibration is None


def test_calibration_of_nothing_is_refused():
    with pytest.raises(DataError, match="0 images of nowhere are too few"):
        Calibration(np.empty((0, 4, 4, 3), np.uint8), "nowhere", 0)

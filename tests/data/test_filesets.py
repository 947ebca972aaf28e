from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rkd_deploy.data import splits
from rkd_deploy.data.sources import FileSplit, ImageSet, Split, load_images
from rkd_deploy.data.splits import channel_statistics
from rkd_deploy.errors import DataError, RecipeError
from rkd_deploy.recipe import DataRecipe


def load(root: Path, seed: int = 0, name: str = "imagefolder", **how: Any) -> ImageSet:
    settings: dict[str, Any] = {"image_size": 8, "workers": 1, "cache": "off"}
    return load_images(DataRecipe(name=name, root=str(root), **(settings | how)), seed)


def files(split: Any) -> set[str]:
    assert isinstance(split, FileSplit)
    return {split.source.name(int(position)) for position in split.index_N}


def test_the_folders_play_the_splits_and_the_rest_is_held_out_by_seed(photos: Path) -> None:
    images = load(photos, val_fraction=0.25)
    assert (len(images.train), len(images.val), len(images.test)) == (14, 4, 6)
    assert not files(images.train) & files(images.val)
    assert all("/val/" in path for path in files(images.test))
    assert all("/train/" in path for path in files(images.train) | files(images.val))
    assert images.sources["test"] == "folder val"
    assert images.sources["val"] == "0.25 of train, held out with train.seed = 0"
    assert files(load(photos, val_fraction=0.25).val) == files(images.val)
    assert files(load(photos, seed=1, val_fraction=0.25).val) != files(images.val)


def test_a_given_validation_split_is_used_whole(photos: Path) -> None:
    (photos / "val").rename(photos / "test")
    for wnid in ("n01440764", "n02102040"):
        (photos / "valid" / wnid).mkdir(parents=True)
        next((photos / "train" / wnid).iterdir()).rename(photos / "valid" / wnid / "1.jpg")
    images = load(photos)
    assert (len(images.train), len(images.val), len(images.test)) == (16, 2, 6)
    assert (images.sources["val"], images.sources["test"]) == ("folder valid", "folder test")


def test_without_folders_a_share_of_every_class_is_tested_on_whatever_the_seed_of_training(flat: Path) -> None:
    images = load(flat, test_fraction=0.34)
    assert images.test.labels_N.bincount().tolist() == [2, 2, 2]
    assert not files(images.test) & (files(images.train) | files(images.val))
    assert len(files(images.train) | files(images.val)) == 12
    assert images.sources["test"] == "0.34 of every class, drawn with data.split_seed = 0"
    assert files(load(flat, seed=5, test_fraction=0.34).test) == files(images.test)
    assert files(load(flat, test_fraction=0.34, split_seed=1).test) != files(images.test)


@pytest.mark.parametrize("how", [{"test_fraction": 0.3}, {"split_seed": 3}])
def test_drawing_a_test_split_is_refused_where_there_is_one(photos: Path, how: dict[str, Any]) -> None:
    key = next(iter(how))
    with pytest.raises(RecipeError, match=rf"data\.{key} = .* has no effect: the test split is folder val"):
        load(photos, **how)


def test_limits_are_exact_and_leave_the_test_images_alone(photos: Path) -> None:
    images = load(photos, train_limit=10, test_limit=3, val_fraction=0)
    assert images.train.labels_N.bincount().tolist() == [4, 3, 3]
    assert images.test.labels_N.bincount().tolist() == [1, 1, 1]
    assert files(images.test) == files(load(photos, test_limit=3).test)
    with pytest.raises(DataError, match=r"data\.train_limit = 19 must be between 3 .* and 18"):
        load(photos, train_limit=19)


def test_auto_keeps_in_memory_what_fits(photos: Path) -> None:
    size = 24 * 3 * 8 * 8  # bytes of all images
    fits = load(photos, cache="auto", cache_gb=size / 1e9)
    streams = load(photos, cache="auto", cache_gb=(size - 1) / 1e9)
    assert isinstance(fits.train, Split)
    assert isinstance(streams.train, FileSplit)
    assert fits.sources["reading"] == "decoded once into memory"
    assert streams.sources["reading"] == "streamed"
    assert torch.equal(fits.train.images_NCHW, torch.cat(list(streams.train.chunks(5))))
    assert (fits.mean, fits.std) == (streams.mean, streams.std)


def test_normalisation_is_measured_over_the_training_images(photos: Path) -> None:
    images = load(photos, cache="memory", cache_gb=2.0)
    assert isinstance(images.train, Split)
    pixels = images.train.images_NCHW.numpy().astype(np.float64) / 255
    assert images.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=6e-5)
    assert images.std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=6e-5)
    stated = load(photos, mean=(0.1, 0.2, 0.3))
    assert (stated.mean, stated.std) == ((0.1, 0.2, 0.3), images.std)


def test_large_sets_are_measured_over_a_sample_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(images_NCHW=torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8), labels_N=torch.arange(60))
    whole = channel_statistics(split, 0)
    monkeypatch.setattr(splits, "SAMPLE", 20)
    samples = [channel_statistics(split, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert whole not in samples
    assert samples[0][0] == pytest.approx(whole[0], abs=0.06)


def test_one_flat_colour_has_a_deviation_that_can_be_divided_by() -> None:
    flat = Split(images_NCHW=torch.full((3, 3, 2, 2), 51, dtype=torch.uint8), labels_N=torch.arange(3))
    mean, std = channel_statistics(flat, 0)
    assert mean == (0.2,) * 3
    assert min(std) > 0


def test_imagenet_has_its_own_normalisation_and_crop(photos: Path) -> None:
    images = load(photos, name="imagenet", image_size=None)
    assert (images.mean, images.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert images.image_size == (224, 224)
    assert round(224 / images.crop_fraction) == 256
    path = photos / "val" / "n01440764" / "0.png"
    Image.radial_gradient("L").resize((512, 300)).save(path)
    first = next(load(photos, name="imagenet", image_size=None).test.chunks(1))[0]
    with Image.open(path) as image:
        from torchvision.transforms import v2

        wanted = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(image.convert("RGB"))
    assert torch.equal(first, wanted)


def test_the_sums_of_the_splits_are_what_is_on_disk(photos: Path) -> None:
    images = load(photos, val_fraction=0.5)
    assert len(files(images.train) | files(images.val) | files(images.test)) == 24


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_set_without_an_image_to_test_on_is_refused_before_training(flat: Path, cache: str) -> None:
    for folder in flat.iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
    with pytest.raises(DataError, match=r"No image is left to test on: 3 images of 3 classes, and a class with one"):
        load(flat, cache=cache)


def test_test_images_that_are_all_broken_are_none(photos: Path) -> None:
    for path in (photos / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"No image is left to test on: 18 images of 3 classes, 6 broken ones"):
        load(photos, broken="skip")


def test_what_was_left_out_is_among_the_sources(photos: Path) -> None:
    assert "left out" not in load(photos).sources
    for number, name in enumerate(("a.avif", "b.avif", "notes.txt")):
        (photos / ("val" if number else "train") / "n01440764" / name).write_bytes(b"")
    assert load(photos).sources["left out"] == "2 .avif, 1 .txt"


def test_sets_in_memory_are_held_to_an_image_of_each_class_too() -> None:
    with pytest.raises(DataError, match=r"No training image is left of 5 of 10 classes .*lower data\.val_fraction"):
        load_images(DataRecipe(train_limit=10, val_fraction=0.5), 0)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
@pytest.mark.parametrize("root", ["x" * 300, "a\0b", "/dev/zero", "/etc/hostname"])
def test_roots_that_are_no_folder(name: str, root: str) -> None:
    with pytest.raises(DataError, match=r"There is no folder|does not hold train/ and val/"):
        load_images(DataRecipe(name=name, root=root), 0)

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from rkd_deploy.data import sources
from rkd_deploy.data.sources import ImageSet, Split, load_images, on_device
from rkd_deploy.errors import DataError
from rkd_deploy.recipe import DataRecipe

CLASSES = tuple(str(digit) for digit in range(10))


def load(seed: int = 0, **how: Any) -> ImageSet:
    return load_images(DataRecipe(**{"image_size": 8, **how}), seed)


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> tuple[Split, Split]:
    """In place of digits, images that are their own position: 300 + 90 of 10 classes of different sizes."""

    def made(count: int, first: int) -> Split:
        images_NCHW = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        images_NCHW[:, 0, 0, 0], images_NCHW[:, 0, 0, 1] = torch.arange(count) % 256, first + torch.arange(count) // 256
        return Split(images_NCHW=images_NCHW, labels_N=torch.arange(count) ** 2 % 37 % 10)

    train, test = made(300, 0), made(90, 100)
    monkeypatch.setattr(sources, "_digits", lambda size: (train, test, CLASSES))
    return train, test


def positions(split: Split) -> list[int]:
    corner = split.images_NCHW[:, 0, 0].long()
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


# Digits


def test_digits_are_those_of_scikit_learn() -> None:
    bunch, images = load_digits(), load(val_fraction=0)
    grey = torch.cat([images.train.images_NCHW, images.test.images_NCHW])
    assert (len(images.train), len(images.val), len(images.test)) == (1438, 0, 359)  # 1,797 of which a fifth
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    wanted = torch.from_numpy(bunch.images) * 255 / 16  # 17 levels of grey, at their own size
    assert (grey[:, 0] - wanted).abs().max() <= 0.5
    assert torch.cat([images.train.labels_N, images.test.labels_N]).tolist() == bunch.target.tolist()
    assert images.classes == CLASSES
    assert grey.dtype == torch.uint8


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_digits_come_at_the_size_that_was_asked_for(size: int) -> None:
    images = load(image_size=size)
    assert images.image_size == (size, size)
    assert images.train.images_NCHW.shape[1:] == images.test.images_NCHW.shape[1:] == (3, size, size)


def test_digits_are_16_pixels_by_default_and_normalised_by_their_own_statistics() -> None:
    images = load_images(DataRecipe(val_fraction=0), 0)
    assert images.image_size == (16, 16)
    pixels = images.train.images_NCHW[:, 0].double() / 255
    assert images.mean == pytest.approx([pixels.mean().item()] * 3, abs=0.001)
    assert images.std == pytest.approx([pixels.std().item()] * 3, abs=0.001)


def test_the_test_hands_are_not_the_training_hands() -> None:
    """By position: the test split is the end of the file."""
    labels = load_digits().target.tolist()
    assert load().test.labels_N.tolist() == labels[-359:]


# Held-out images


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 30), (0.25, 75), (0.5, 150)])
def test_no_image_is_both_learnt_from_and_held_out(fraction: float, count: int) -> None:
    images = load(val_fraction=fraction)
    train, val = positions(images.train), positions(images.val)
    assert len(val) == count
    assert sorted(train + val) == list(range(300))
    assert not set(train + val) & set(positions(images.test))


@pytest.mark.usefixtures("numbered")
def test_labels_stay_with_their_images(numbered: tuple[Split, Split]) -> None:
    images = load(val_fraction=0.3, train_limit=120, test_limit=40)
    for split, source, first in ((images.train, 0, 0), (images.val, 0, 0), (images.test, 1, 256 * 100)):
        wanted = [numbered[source].labels_N[position - first].item() for position in positions(split)]
        assert split.labels_N.tolist() == wanted


@pytest.mark.usefixtures("numbered")
def test_the_seed_decides_what_is_held_out() -> None:
    held_out = [positions(load(seed).val) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


# Limits


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("limit", [10, 14, 57, 100])
def test_a_limit_takes_the_same_number_of_every_class(limit: int, numbered: tuple[Split, Split]) -> None:
    images = load(train_limit=limit, val_fraction=0)
    most = numbered[0].labels_N.bincount(minlength=10)
    wanted = [limit // 10 + (label < limit % 10) for label in range(10)]
    assert all(share <= have for share, have in zip(wanted, most.tolist(), strict=True))
    assert images.train.labels_N.bincount(minlength=10).tolist() == wanted
    assert len(set(positions(images.train))) == limit


@pytest.mark.usefixtures("numbered")
def test_limits_are_drawn_by_seed() -> None:
    """Training images by train.seed; test images by split_seed alone, so that every seed is judged on the same ones."""
    train = [positions(load(seed, train_limit=50).train) for seed in (0, 0, 1)]
    assert train[0] == train[1] != train[2]
    test = [positions(load(seed, test_limit=50).test) for seed in (0, 1)]
    assert test[0] == test[1] != positions(load(test_limit=50, split_seed=1).test)


@pytest.mark.usefixtures("numbered")
def test_a_limit_of_all_is_no_limit() -> None:
    assert positions(load(train_limit=300, val_fraction=0).train) == list(range(300))


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    ("key", "limit", "count"), [("train_limit", 9, 300), ("train_limit", 301, 300), ("test_limit", 91, 90)]
)
def test_a_limit_that_cannot_be_is_refused(key: str, limit: int, count: int) -> None:
    message = rf"data\.{key} = {limit} must be between 10 \(one of each class\) and {count} \(all\)"
    with pytest.raises(DataError, match=message):
        load(**{key: limit})


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("limit", [150, 211, 289, 299])
def test_a_class_with_too_few_images_gives_all_and_the_others_more(limit: int, numbered: tuple[Split, Split]) -> None:
    """Exactly as many as were asked for; nobody who could give has less than another by more than one."""
    have = numbered[0].labels_N.bincount(minlength=10).tolist()
    got = load(train_limit=limit, val_fraction=0).train.labels_N.bincount(minlength=10).tolist()
    assert sum(got) == limit
    most = max(got)
    assert all(share == available or share >= most - 1 for share, available in zip(got, have, strict=True))
    assert len(set(have)) > 1


@pytest.mark.usefixtures("numbered")
def test_how_many_are_trained_on_does_not_change_what_is_tested_on() -> None:
    whole, part = load(test_limit=40), load(test_limit=40, train_limit=70)
    assert positions(whole.test) == positions(part.test)
    assert positions(load(train_limit=70).train) == positions(part.train)


# The rest


def test_normalisation_of_the_recipe_goes_before_that_of_the_set() -> None:
    images = load(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (images.mean, images.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_split_on_a_device_is_the_same_split() -> None:
    split = load().val
    moved = on_device(split, torch.device("cpu"))
    assert torch.equal(moved.images_NCHW, split.images_NCHW)
    assert torch.equal(moved.labels_N, split.labels_N)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rkd_deploy.data import augment
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split

CPU = torch.device("cpu")
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
AS_IT_IS = Normaliser((0, 0, 0), (1 / 255,) * 3, CPU)  # pixel values, as floats


def split(count: int, size: tuple[int, int] = (5, 6)) -> Split:
    """Random images whose label is their position."""
    images_NCHW = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    return Split(images_NCHW=images_NCHW, labels_N=torch.arange(count))


def loader(images: Split, **changes: Any) -> DeviceLoader:
    how: dict[str, Any] = {"batch_size": 4, "augmentations": ("crop", "flip"), "crop_padding": 2, "seed": 7}
    return DeviceLoader(images, AS_IT_IS, **(how | changes))


def equal(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    same = [torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)]
    return all(same)


# Normalisation


def test_normalisation_is_torchvisions() -> None:
    images_NCHW = torch.randint(0, 256, (5, 3, 8, 9), dtype=torch.uint8)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    wanted = torch.stack([theirs(Image.fromarray(np.asarray(image.permute(1, 2, 0)))) for image in images_NCHW])
    ours = Normaliser(MEAN, STD, CPU)(images_NCHW)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    assert (Normaliser(MEAN, (*STD[:2], STD[2] + 1e-4), CPU)(images_NCHW) - wanted).abs().max() > 1e-5  # says no


def test_normalisation_of_every_pixel_value_is_right_to_rounding() -> None:
    values_NCHW = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) for numbers in (MEAN, STD))
    exact = (values_NCHW.double() / 255 - mean) / std
    error = (Normaliser(MEAN, STD, CPU)(values_NCHW).double() - exact).abs().max()
    assert error < 3 * 2**-23  # values are below 4 in magnitude: a unit in the last place is at most 2^-22


# Order


@settings(max_examples=30)
@given(
    count=st.integers(1, 40), batch_size=st.integers(2, 50), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 300)
)
def test_an_epoch_gives_every_image_once_but_for_the_remainder(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    train = loader(split(count), batch_size=batch_size, seed=seed)
    batches = list(train.epoch(epoch))
    used = min(batch_size, count)
    assert (train.batch_size, len(train), len(batches)) == (used, count // used, count // used)
    assert all(x.shape == (used, 3, 5, 6) and y.shape == (used,) for x, y in batches)
    labels = torch.cat([y for _, y in batches]).tolist()
    assert len(set(labels)) == len(labels) == count // used * used


def test_an_epoch_is_the_same_each_time_and_in_another_loader() -> None:
    images = split(23)
    train = loader(images)
    first = list(train.epoch(3))
    list(train.epoch(4))
    assert equal(first, list(train.epoch(3)))
    torch.manual_seed(99)  # what is drawn elsewhere does not matter
    assert equal(first, list(loader(images).epoch(3)))


@pytest.mark.parametrize("augmentations", [(), ("crop",), ("flip",), ("crop", "flip")])
def test_a_resumed_epoch_goes_on_with_what_it_would_have_given(augmentations: tuple[str, ...]) -> None:
    train = loader(split(23), augmentations=augmentations)
    whole = list(train.epoch(5))
    for first in range(len(train) + 1):
        assert equal(list(train.epoch(5, first)), whole[first:])


def test_other_epochs_and_other_seeds_give_another_order() -> None:
    images = split(40)
    orders = {
        tuple(torch.cat([y for _, y in loader(images, seed=seed).epoch(epoch)]).tolist())
        for seed in range(6)
        for epoch in range(6)
    }
    assert len(orders) == 36


# Augmentation


def test_without_augmentation_the_images_come_as_they_are() -> None:
    images = split(20)
    for x, y in loader(images, augmentations=()).epoch(0):
        torch.testing.assert_close(x, images.images_NCHW[y].float(), rtol=1e-6, atol=1e-5)


def test_augmented_images_are_windows_of_their_source_and_every_window_occurs() -> None:
    """Every image that comes out is found among the 2 (2P + 1)^2 that can be, and over time all of them come out."""
    images = split(8)
    padded_NCHW = augment.pad(images.images_NCHW, 1)
    train, windows = loader(images, crop_padding=1), set()
    for epoch in range(60):
        for x, y in train.epoch(epoch):
            for image, label in zip(x.round().to(torch.uint8), y.tolist(), strict=True):
                matches = []
                for top in range(3):
                    for left in range(3):
                        window = padded_NCHW[label, :, top : top + 5, left : left + 6]
                        matches += [
                            (top, left, f) for f in (False, True) if torch.equal(image, window.flip(2) if f else window)
                        ]
                assert len(matches) == 1
                windows.add(matches[0])
    assert len(windows) == 18


def test_half_of_the_images_are_mirrored_and_not_the_same_ones_in_each_batch() -> None:
    images = split(500)
    flips, patterns = 0, set()
    for x, y in loader(images, augmentations=("flip",)).epoch(0):
        source = images.images_NCHW[y].float()
        mirrored = (x.round() == source.flip(3)).flatten(1).all(1)
        assert ((x.round() == source).flatten(1).all(1) ^ mirrored).all()
        flips += int(mirrored.sum())
        patterns.add(tuple(mirrored.tolist()))
    assert len(patterns) == 2**4  # of a batch of 4
    assert abs(flips - 250) < 4 * (500 * 0.25) ** 0.5  # four standard deviations of a fair coin


def test_windows_are_drawn_for_every_image_of_the_epoch() -> None:
    """A marked pixel in the middle tells how far each image was moved."""
    images = split(400)
    images.images_NCHW.zero_()
    images.images_NCHW[:, :, 2, 2] = 255
    batches = [x[:, 0].flatten(1).argmax(1) for x, _ in loader(images, augmentations=("crop",)).epoch(0)]
    moved = torch.stack(batches)  # [100 batches, 4 images]
    assert len(moved.unique()) == 25  # each of (2 * 2 + 1)^2
    assert all(len(moved[:, place].unique()) > 15 for place in range(4))


def test_padding_is_black_before_normalisation() -> None:
    """Zeros are padded as pixels, as torchvision does before ToTensor, not as normalised values."""
    white = Split(images_NCHW=torch.full((4, 3, 4, 4), 255, dtype=torch.uint8), labels_N=torch.arange(4))
    train = DeviceLoader(
        white, Normaliser(MEAN, STD, CPU), batch_size=4, augmentations=("crop",), crop_padding=4, seed=0
    )
    x, _ = next(train.epoch(0))
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        values = x[:, channel].unique().tolist()
        assert values == pytest.approx([-mean / std, (1 - mean) / std], abs=1e-6)

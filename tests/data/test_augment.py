from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as torchvision

from rkd_deploy.data import augment


@given(
    padding=st.integers(0, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    chosen=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    data=st.data(),
)
def test_crop_is_torchvisions_image_by_image(
    padding: int, size: tuple[int, int], chosen: list[int], data: st.DataObject
) -> None:
    images_NCHW = torch.randint(0, 256, (7, 3, *size), dtype=torch.uint8)
    offsets = st.lists(st.integers(0, 2 * padding), min_size=len(chosen), max_size=len(chosen))
    tops, lefts = data.draw(offsets), data.draw(offsets)
    padded_NCHW = augment.pad(images_NCHW, padding)
    ours = augment.crop(padded_NCHW, torch.tensor(chosen), torch.tensor(tops), torch.tensor(lefts), size)
    theirs = [
        torchvision.crop(torchvision.pad(images_NCHW[index], [padding]), top, left, *size)
        for index, top, left in zip(chosen, tops, lefts, strict=True)
    ]
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, torch.stack(theirs))


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_flip_is_torchvisions_image_by_image(flipped: list[bool]) -> None:
    images_NCHW = torch.randint(0, 256, (len(flipped), 3, 4, 5), dtype=torch.uint8)
    ours = augment.flip(images_NCHW, torch.tensor(flipped))
    theirs = [torchvision.hflip(image) if marked else image for image, marked in zip(images_NCHW, flipped, strict=True)]
    assert torch.equal(ours, torch.stack(theirs))


def test_a_shift_by_one_row_is_seen() -> None:
    """The judges above can say no."""
    padded_NCHW = augment.pad(torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4), 1)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert not torch.equal(
        augment.crop(padded_NCHW, zero, zero, one, (4, 4)), augment.crop(padded_NCHW, zero, one, one, (4, 4))
    )


def test_the_source_is_not_written_to() -> None:
    images_NCHW = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before = images_NCHW.clone()
    zeros = torch.zeros(2, dtype=torch.long)
    augment.crop(images_NCHW, torch.arange(2), zeros, zeros, (4, 4)).zero_()
    augment.flip(images_NCHW, torch.tensor([True, False])).zero_()
    assert torch.equal(images_NCHW, before)

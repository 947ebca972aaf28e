from __future__ import annotations

import pytest
import torch

from rkd_deploy.data.augment import Mixing
from rkd_deploy.data.batches import EpochBatches, Share, seeded_image
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.errors import RecipeError

PIXELS = Normaliser((0, 0, 0), (1 / 255,) * 3, torch.device("cpu"))
ALL = ("resized_crop", "flip", "randaugment")


def loader(share: Share, **mixing: float) -> DeviceLoader:
    generator = torch.Generator().manual_seed(3)
    images_NCHW = torch.randint(0, 256, (26, 3, 12, 12), dtype=torch.uint8, generator=generator)
    split = Split(images_NCHW=images_NCHW, labels_N=torch.arange(26) % 5)
    return DeviceLoader(
        split,
        PIXELS,
        batch_size=8,
        augmentations=ALL,
        crop_padding=2,
        seed=4,
        mixing=Mixing(classes=5, **mixing),
        share=share,
    )


@pytest.mark.parametrize("mixing", [{}, {"label_smoothing": 0.1}, {"mixup": 0.5, "cutmix": 0.5}])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_batches_of_one(processes: int, mixing: dict[str, float]) -> None:
    whole = list(loader(Share(), **mixing).epoch(2))
    parts = [loader(Share(rank, processes), **mixing) for rank in range(processes)]
    assert [(len(part), part.batch_size) for part in parts] == [(3, 8 // processes)] * processes
    for index, batches in enumerate(zip(*(part.epoch(2) for part in parts), strict=True)):
        for which in range(2):
            assert torch.equal(torch.cat([batch[which] for batch in batches]), whole[index][which])


def test_resuming_gives_the_rest_with_everything_on() -> None:
    batches = loader(Share(), mixup=0.5, cutmix=0.5, label_smoothing=0.1)
    whole = list(batches.epoch(1))
    for first in range(4):
        rest = list(batches.epoch(1, first))
        assert len(rest) == 3 - first
        for resumed, other in zip(rest, whole[first:], strict=True):
            assert torch.equal(resumed[0], other[0])
            assert torch.equal(resumed[1], other[1])


def test_partners_stand_in_front_and_the_last_before_the_first() -> None:
    alone = EpochBatches(10, 4, Share(), partners=True)
    assert [alone.positions(batch).tolist() for batch in range(len(alone))] == [[3, 0, 1, 2, 3], [7, 4, 5, 6, 7]]
    second = EpochBatches(10, 4, Share(1, 2), partners=True)
    assert second.positions(1).tolist() == [5, 6, 7]
    assert EpochBatches(10, 4, Share(1, 2), partners=False).positions(1).tolist() == [6, 7]


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size = 8 is that of all 3 processes .* Take a multiple"):
        loader(Share(0, 3))


def test_a_set_smaller_than_a_batch_is_divided_too() -> None:
    small = EpochBatches(7, 64, Share(1, 2), partners=False)
    assert (len(small), small.size, small.positions(0).tolist()) == (1, 3, [3, 4, 5])


def test_the_random_numbers_of_an_image_are_its_own_and_leave_the_others_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded_image(1, 2, 3):
        drawn = torch.rand(4)
    assert torch.equal(torch.cat([first, torch.rand(1)]), wanted)
    with seeded_image(1, 2, 3):
        assert torch.equal(torch.rand(4), drawn)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        with seeded_image(*other):
            assert not torch.equal(torch.rand(4), drawn)


def test_each_batch_of_each_epoch_is_mixed_by_other_numbers() -> None:
    batches = loader(Share(), mixup=1.0)
    shares = [batch[1].max(1).values.min().item() for epoch in range(4) for batch in batches.epoch(epoch)]
    assert len(shares) == len(set(shares)) == 12

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from rkd_deploy.data.batches import Share, seeded_image
from rkd_deploy.data.loader import DeviceLoader, Normaliser, StreamLoader, train_loader
from rkd_deploy.data.sources import FileSplit, ImageSet, Split, load_images
from rkd_deploy.errors import DataError
from rkd_deploy.recipe import DataRecipe

PIXELS = Normaliser((0, 0, 0), (1 / 255,) * 3, torch.device("cpu"))


def recipe(photos: Path, **changes: Any) -> DataRecipe:
    how: dict[str, Any] = {"image_size": 24, "cache": "off", "workers": 0, "val_fraction": 0}
    return DataRecipe(name="imagefolder", root=str(photos), **(how | changes))


def loaded(photos: Path, **changes: Any) -> tuple[StreamLoader, ImageSet]:
    share = changes.pop("share", Share())
    table = recipe(photos, **changes)
    images = load_images(table, 0)
    train = train_loader(table, images.train, PIXELS, classes=3, batch_size=4, seed=5, share=share)
    assert isinstance(train, StreamLoader)
    return train, images


def equal(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.3, "cutmix": 1.0, "label_smoothing": 0.1}])
def test_an_epoch_is_the_same_with_and_without_workers_and_from_any_batch_on(
    photos: Path, mixing: dict[str, float]
) -> None:
    how = {"augment": ("resized_crop", "flip", "randaugment"), **mixing}
    alone, _ = loaded(photos, **how)
    whole = list(alone.epoch(3))
    assert (len(alone), len(whole), alone.batch_size) == (4, 4, 4)
    assert whole[0][1].shape == ((4, 3) if mixing else (4,))
    helped, _ = loaded(photos, workers=2, **how)
    torch.manual_seed(77)  # what is drawn elsewhere does not matter
    assert equal(list(helped.epoch(3)), whole)
    for first in (1, 3, 4):
        assert equal(list(helped.epoch(3, first)), whole[first:])
    abandoned = helped.epoch(3)
    next(abandoned)
    abandoned.close()
    assert equal(list(helped.epoch(3)), whole)  # after one that was given up half way
    assert not equal(list(helped.epoch(4)), whole)


def test_processes_together_see_the_batches_of_one(photos: Path) -> None:
    how = {"mixup": 0.5, "augment": ("resized_crop", "flip")}
    whole = list(loaded(photos, **how)[0].epoch(0))
    parts = [list(loaded(photos, share=Share(rank, 2), **how)[0].epoch(0)) for rank in range(2)]
    joined = [tuple(torch.cat(pair) for pair in zip(*batches, strict=True)) for batches in zip(*parts, strict=True)]
    assert equal(joined, whole)


def test_images_are_what_torchvisions_pipeline_makes_of_the_file_by_the_same_seed(photos: Path) -> None:
    train, images = loaded(
        photos, augment=("resized_crop", "flip", "randaugment"), randaugment_ops=3, randaugment_magnitude=7
    )
    split = images.train
    assert isinstance(split, FileSplit)
    pipeline = v2.Compose(
        [v2.RandomResizedCrop(24, antialias=True), v2.PILToTensor(), v2.RandomHorizontalFlip(), v2.RandAugment(3, 7)]
    )
    order = split.source.shuffled(split.index_N, torch.Generator().manual_seed(5 * 1_000_003 + 2)).tolist()
    wanted = []
    for position in order[:4]:
        with seeded_image(5, 2, position), Image.open(split.source.name(int(split.index_N[position]))) as image:
            wanted.append(pipeline(image.convert("RGB")))
    x, y = next(train.epoch(2))
    torch.testing.assert_close(x, torch.stack(wanted).float(), rtol=1e-6, atol=1e-4)
    assert y.tolist() == split.labels_N[order[:4]].tolist()


def test_without_augmentation_streamed_and_cached_sets_train_on_the_same_pixels(photos: Path) -> None:
    streamed, _ = loaded(photos, augment=())
    table = recipe(photos, augment=(), cache="memory")
    cached = train_loader(table, load_images(table, 0).train, PIXELS, classes=3, batch_size=4, seed=5)
    assert isinstance(cached, DeviceLoader)
    for batch, other in zip(streamed.epoch(0), cached.epoch(0), strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def test_an_image_that_goes_away_is_named(photos: Path) -> None:
    train, images = loaded(photos, workers=2)
    gone = Path(images.train.source.name(0))  # type: ignore[union-attr]
    gone.unlink()
    with pytest.raises(DataError) as caught:
        list(train.epoch(0))
    assert str(gone) in str(caught.value)
    assert "No such file" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_are_all_images_in_order_as_torchvision_resizes_and_crops_them(photos: Path, workers: int) -> None:
    wide = Image.open(next((photos / "val" / "n01440764").iterdir())).resize((300, 200))
    wide.save(photos / "val" / "n01440764" / "wide.png")
    test = load_images(recipe(photos, image_size=28, crop_fraction=0.875, workers=workers), 0).test
    assert isinstance(test, FileSplit)
    chunks = list(test.chunks(4))
    assert [len(chunk) for chunk in chunks] == [4, 3]
    rule = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])
    wanted = []
    for position in range(7):
        with Image.open(test.source.name(position)) as image:
            wanted.append(rule(image.convert("RGB")))
    assert torch.equal(torch.cat(chunks), torch.stack(wanted))
    cached = load_images(recipe(photos, image_size=28, crop_fraction=0.875, cache="memory"), 0).test
    assert isinstance(cached, Split)
    assert np.array_equal(cached.images_NCHW, torch.cat(chunks))

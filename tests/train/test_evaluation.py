from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms

from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.sources import ImageSet, Split
from rkd_deploy.data.splits import EVALUATED_AT_ONCE as BATCH
from rkd_deploy.data.splits import evaluation_batch
from rkd_deploy.models import zoo
from rkd_deploy.train.checkpoints import load_checkpoint
from rkd_deploy.train.evaluation import SplitHash, predictions
from rkd_deploy.train.weights import load_weights

MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)  # what the public checkpoints were trained with
PIXELS = Normaliser((0, 0, 0), (1 / 255,) * 3, torch.device("cpu"))


class Brightest(nn.Module):
    """Logits that are the values of one row of pixels; in training mode it says something else."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def forward(self, x_NCHW: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.largest = max(self.largest, len(x_NCHW))
        return -x_NCHW[:, 0, 0] if self.training else x_NCHW[:, 0, 0]


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_largest_logit_of_every_image_in_order(count: int, training: bool) -> None:
    labels_N = torch.randint(0, 7, (count,))
    images_NCHW = torch.randint(0, 100, (count, 3, 2, 7), dtype=torch.uint8)
    images_NCHW[torch.arange(count), 0, 0, labels_N] = 200
    module = Brightest().train(training)
    predicted = predictions(module, Split(images_NCHW=images_NCHW, labels_N=labels_N), PIXELS)
    assert torch.equal(predicted, labels_N)
    assert module.training == training  # left as it was, and evaluated in eval mode
    assert module.largest == min(count, BATCH)


def test_batch_norm_is_not_moved() -> None:
    model = zoo.create("resnet8", 10).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images_NCHW = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    predictions(model, Split(images_NCHW=images_NCHW, labels_N=torch.zeros(20).long()), PIXELS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def pretrained(shared_data: Path, name: str) -> nn.Module:
    path = shared_data / "weights" / f"cifar100_{name}.pth"
    model = zoo.create(name, 100)
    load_weights(model, load_checkpoint(path).state, str(path), name)
    return model.eval()


@torch.no_grad()
def test_predictions_are_those_of_torchvisions_pipeline(shared_data: Path, cifar100: ImageSet) -> None:
    """A real network on 250 real images, each of them prepared alone by torchvision."""
    model, split = pretrained(shared_data, "resnet20"), cifar100.test.take(torch.arange(0, 10_000, 40))
    theirs = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    wanted = torch.cat([model(theirs(image)[None]).argmax(1) for image in split.images_NCHW])
    predicted = predictions(model, split, Normaliser(MEAN, STD, torch.device("cpu")))
    assert torch.equal(predicted, wanted)
    assert 59 < 100 * (predicted == split.labels_N).float().mean() < 79  # 68.83 % of all 10,000


@pytest.mark.slow
def test_a_pretrained_network_has_its_published_accuracy(shared_data: Path, cifar100: ImageSet) -> None:
    """68.83 % of the 10,000 test images; tests/test_cifar100.py has ResNet-56 and the numbers of a run."""
    model = pretrained(shared_data, "resnet20").to(memory_format=torch.channels_last)  # twice as fast, same result
    predicted = predictions(model, cifar100.test, Normaliser(MEAN, STD, torch.device("cpu")))
    right = int((predicted == cifar100.test.labels_N).sum())
    assert right == pytest.approx(6883, abs=2)  # an image whose two largest logits are equal to rounding may turn


def test_large_images_are_evaluated_fewer_at_once() -> None:
    """So that the maps of a batch stay within the memory that small ones take."""
    assert [evaluation_batch((side, side)) for side in (8, 32, 91, 224, 4096)] == [500, 500, 500, 83, 1]


def test_the_hash_of_a_split_is_of_its_pixels_and_labels_however_they_are_cut() -> None:
    images_NCHW = torch.randint(0, 256, (7, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels_N = torch.arange(7)
    expected = hashlib.sha256(b"(2, 4)" + images_NCHW.numpy().tobytes() + labels_N.numpy().tobytes()).hexdigest()
    for size in (1, 3, 7):
        split_hash = SplitHash((2, 4))
        for batch in images_NCHW.split(size):
            split_hash.add(batch)
        assert split_hash.finish(labels_N) == expected
    assert SplitHash((4, 2)).finish(labels_N) != SplitHash((2, 4)).finish(labels_N)

"""Our loaders beside torchvision's on the same cores, and beside a training step.

    uv run python benchmarks/loader.py --cifar .data --photos FOLDER

CIFAR-100, batch 64, crop and flip and normalisation: `DeviceLoader` on one thread beside torchvision's transforms in a
DataLoader of 2 worker processes. Photos (train/CLASS/*.jpg): `StreamLoader` beside ImageFolder in a DataLoader, both
with 2 workers, RandomResizedCrop(224) and flip. A step is S imitating ResNet-56, S and A cut from ResNet-20, batch 64.
Everything alternates in one process; rates are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import Claim, ratio_of_medians, save
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from rkd_deploy.data.loader import Loader, Normaliser, train_loader
from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.recipe import DataRecipe, TrainRecipe
from rkd_deploy.train.methods.residual import StudentStep
from rkd_deploy.train.stepping import Stepper

BATCH, WORKERS, ROUNDS = 64, 2, 7
CPU = torch.device("cpu")


def main() -> None:
    """Measure and keep the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar", required=True, help="folder that holds cifar-100-python/")
    parser.add_argument("--photos", required=True, help="folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    save("loader", [*of_cifar(arguments.cifar), of_photos(arguments.photos)])


def of_cifar(root: str) -> list[Claim]:
    """Seconds an image of both loaders, and seconds a batch of ours beside a step."""
    recipe = DataRecipe(name="cifar100", root=root, val_fraction=0)
    images = load_images(recipe, 0)
    ours = ours_of(recipe, images)
    steps = [
        transforms.RandomCrop(32, 4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(images.mean, images.std),
    ]
    theirs = theirs_of(datasets.CIFAR100(root, transform=transforms.Compose(steps)))
    step = student_step()
    x_NCHW, y_N = next(ours.epoch(0))
    samples: dict[str, list[float]] = {"ours": [], "theirs": [], "batch": [], "step": []}
    for number in range(ROUNDS):
        samples["ours"].append(seconds_a_batch(ours.epoch(number), 200) / BATCH)
        samples["theirs"].append(seconds_a_batch(theirs, 60) / BATCH)
        samples["batch"].append(samples["ours"][-1] * BATCH)
        samples["step"].append(seconds_of(lambda: step(x_NCHW, y_N)))
    speed = median(samples["theirs"]) / median(samples["ours"])
    return [
        Claim("CIFAR: images per second, ours", 1 / median(samples["ours"]), "1/s", None),
        Claim("CIFAR: torchvision with 2 workers", 1 / median(samples["theirs"]), "1/s", None),
        Claim("CIFAR: ours is so many times as fast", speed, "ratio", None),
        ratio_of_medians("CIFAR: time of an image, ours over torchvision's", 0.2, samples["ours"], samples["theirs"]),
        ratio_of_medians("loader's share of a student step", 0.05, samples["batch"], samples["step"]),
    ]


def of_photos(root: str) -> Claim:
    """Seconds an image of both, streaming from files."""
    recipe = DataRecipe(name="imagefolder", root=root, cache="off", workers=WORKERS, val_fraction=0)
    images = load_images(recipe, 0)
    ours = ours_of(recipe, images)
    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(images.mean, images.std),
    ]
    theirs = theirs_of(datasets.ImageFolder(str(Path(root) / "train"), transform=transforms.Compose(steps)))
    rounds = [(seconds_a_batch(ours.epoch(number), 8), seconds_a_batch(theirs, 8)) for number in range(ROUNDS)]
    numerator, denominator = zip(*rounds, strict=True)
    return ratio_of_medians("photos: time of an image, ours over torchvision's", 1.1, numerator, denominator)


def ours_of(recipe: DataRecipe, images: ImageSet) -> Loader:
    """The loader that training uses."""
    normalise = Normaliser(images.mean, images.std, CPU)
    return train_loader(recipe, images.train, normalise, classes=len(images.classes), batch_size=BATCH, seed=0)


def theirs_of(dataset: Any) -> DataLoader[Any]:
    """Torchvision's, as its references use it; workers live on between epochs, as ours do."""
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)


def student_step() -> Callable[[Any, Any], Any]:
    """Forward, backward and update of S, as the loop does them."""
    separation = separate("resnet20", num_classes=100, input_size=32)
    model = ResidualStudent(separation.student, separation.assistants, 64, 100)
    method = StudentStep(zoo.create("resnet56", 100), model, 1.0)
    stepper = Stepper(method, TrainRecipe(batch_size=BATCH))
    stepper.start_epoch(1)
    return lambda x_NCHW, y_N: stepper.step(x_NCHW, y_N, 0.01)


def seconds_a_batch(batches: Iterable[Any], count: int) -> float:
    """Seconds a batch, the first one (which starts workers or an epoch) left out."""
    iterator = iter(batches)
    next(iterator)
    began = time.perf_counter()
    batch_count = sum(1 for _ in islice(iterator, count))
    return (time.perf_counter() - began) / batch_count


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one call, the median of three."""
    samples = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return median(samples)


if __name__ == "__main__":
    main()

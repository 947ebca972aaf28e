"""An epoch of KD by our loop, over the same epoch by a loop built as mdistiller's is.

    uv run python benchmarks/mdistiller_loop.py

mdistiller (Megvii) is the toolbox that tables of distillation are made with today. Its loop is written here from what
it does: PIL images through torchvision's transforms in 2 DataLoader workers; per step the loss and top-1 and top-5
accuracies are fetched to the host, meters updated, a progress line formatted. Ours is what `rkd-deploy train` runs.
Both train the same student from the same teacher by the same loss (0.1 CE + 0.9 KD, tau = 4) on the same CIFAR-100
images with crop and flip, batch 64, SGD, both in float32 and with the same threads; on a GPU ours in bfloat16
(amp) too, as it is meant to be run there. Epochs alternate, clocks start with the first batch so that starting workers
is not counted, and the figure is the ratio of medians.

Limits: below 1 on a CPU, where both mostly multiply; 0.1 on a GPU, where small networks are bound by launches and
loading, and where ours records its step as a CUDA graph.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import Claim, ratio_of_medians, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.models import zoo
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.methods.base import WeightedLoss
from rkd_deploy.train.methods.baseline import Distilled
from rkd_deploy.train.methods.kd import KD
from rkd_deploy.train.recording import EagerSteps, RecordedSteps
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper

PAIRS = (("resnet56", "resnet20"), ("resnet20", "resnet8"))
BATCH, TAU, CE, KD_WEIGHT, LR = 64, 4.0, 0.1, 0.9, 0.05
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
ROOT = Path(os.environ.get("RKD_DATA", ".data"))


def main() -> None:
    """Measure, and write the record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, rounds, limit = (390, 3, 0.1) if device.type == "cuda" else (6, 5, 1.0)
    images = datasets.CIFAR100(ROOT, train=True, transform=_transforms())
    chosen = Subset(images, range(BATCH * (steps + 1)))
    split = Split(
        images_NCHW=torch.from_numpy(images.data[: len(chosen)]).permute(0, 3, 1, 2).contiguous().to(device),
        labels_N=torch.tensor(images.targets[: len(chosen)], device=device),
    )
    claims = [claim for pair in PAIRS for claim in _compare(*pair, chosen, split, device, rounds, limit)]
    save("mdistiller_loop", claims)


def _compare(
    teacher: str, student: str, chosen: Subset[Any], split: Split, device: torch.device, rounds: int, limit: float
) -> list[Claim]:
    T = zoo.create(teacher, 100).to(device).eval()
    theirs = Theirs(T, _student(student, device), chosen, device)
    ours = {
        name: Ours(T, _student(student, device), split, amp=name == "bfloat16")
        for name in (("float32", "bfloat16") if device.type == "cuda" else ("float32",))
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("theirs", *ours)}
    for number in range(rounds + 1):
        times = {"theirs": theirs.epoch(), **{name: loop.epoch(number) for name, loop in ours.items()}}
        for name, value in times.items() if number > 0 else ():  # the first round warms up
            seconds[name].append(value)
    what = f"KD epoch {teacher} to {student}, over mdistiller's loop"
    names = {name: what if name == "float32" else f"{what}, ours in {name}" for name in ours}
    return [ratio_of_medians(names[name], limit, seconds[name], seconds["theirs"]) for name in ours]


def _student(name: str, device: torch.device) -> FeatureNetwork:
    torch.manual_seed(0)
    return zoo.create(name, 100).to(device)


class Ours:
    """What `rkd-deploy train --set method.name=kd` does in an epoch."""

    def __init__(self, T: FeatureNetwork, S: FeatureNetwork, split: Split, amp: bool) -> None:
        self.device = device = split.labels_N.device
        normalise = Normaliser(MEAN, STD, device)
        self.loader = DeviceLoader(
            split, normalise, batch_size=BATCH, augmentations=("crop", "flip"), crop_padding=4, seed=0
        )
        method = Distilled(T, S, WeightedLoss(KD(TAU, False), KD_WEIGHT, 0), CE)
        recipe = TrainRecipe(lr=LR, amp=amp)
        self.stepper = Stepper(method, recipe)
        self.steps: EagerSteps | RecordedSteps = EagerSteps(self.stepper, self.loader)
        if device.type == "cuda":
            self.steps = RecordedSteps(method, self.stepper.optimizer, recipe, self.loader)

    def epoch(self, number: int) -> float:
        """Seconds from the second batch to the end."""
        self.stepper.start_epoch(number + 1)
        sums, began = EpochSums(), 0.0
        for step, _ in enumerate(self.steps.epoch(number, 0, sums, [LR] * len(self.loader)), 1):
            if step == 1:
                began = _now(self.device)
        sums.means()
        return _now(self.device) - began


class Meter:
    """A running mean, updated on the host."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        """Take a batch's value into the mean."""
        self.total, self.count = self.total + value * count, self.count + count

    @property
    def mean(self) -> float:
        """Mean of the values so far."""
        return self.total / self.count


class Theirs:
    """The loop of the docstring, step by step."""

    def __init__(self, T: nn.Module, S: nn.Module, chosen: Subset[Any], device: torch.device) -> None:
        self.T, self.S, self.device = T, S, device
        self.loader = DataLoader(chosen, BATCH, shuffle=True, num_workers=2)
        self.optimizer = torch.optim.SGD(S.parameters(), LR, momentum=0.9, weight_decay=5e-4)

    def epoch(self) -> float:
        """Seconds from the second batch to the end."""
        losses, top1, top5, began = Meter(), Meter(), Meter(), 0.0
        self.S.train()
        for step, (images, labels) in enumerate(self._batches(), 1):
            x, y = images.float().to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            z_S = self.S(x)
            with torch.no_grad():
                z_T = self.T(x)
            loss = CE * cross_entropy(z_S, y) + KD_WEIGHT * _kd(z_T, z_S)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            right1, right5 = _accuracies(z_S.detach(), y)
            losses.update(float(loss.cpu().detach().numpy().mean()), len(y))
            top1.update(right1.item(), len(y))
            top5.update(right5.item(), len(y))
            f"Loss:{losses.mean:.4f}| Top-1:{top1.mean:.3f}| Top-5:{top5.mean:.3f}"
            if step == 1:
                began = _now(self.device)
        return _now(self.device) - began

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches: Iterable[Any] = self.loader
        yield from batches


def _transforms() -> Any:
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _kd(z_T: Tensor, z_S: Tensor) -> Tensor:
    p_T, log_p_S = softmax(z_T / TAU, 1), log_softmax(z_S / TAU, 1)
    return kl_div(log_p_S, p_T, reduction="none").sum(1).mean() * TAU**2


def _accuracies(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    right_5N = z.topk(5, 1).indices.t() == y
    return 100 * right_5N[0].float().mean(), 100 * right_5N.float().sum(0).mean()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.data.augment import smoothed
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.errors import DivergenceError, InterruptedTraining
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.recipe import Recipe, TrainRecipe
from rkd_deploy.signals import StopRequest
from rkd_deploy.train.evaluation import predictions
from rkd_deploy.train.log import read_log
from rkd_deploy.train.loop import train_phase
from rkd_deploy.train.methods.base import Losses, Method
from rkd_deploy.train.methods.baseline import CrossEntropy
from rkd_deploy.train.runs import Run, create_run
from rkd_deploy.train.state import EpochSums, Phase
from rkd_deploy.train.stepping import Stepper
from rkd_deploy.train.weights import load_tensors

NORMALISE = Normaliser((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))


class ByLabels(Method):
    """A method whose losses depend on the labels alone; it learns one number, whose gradient is the mean label."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt = nn.Parameter(torch.zeros(1))

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        mean = y_N.float().mean()
        logits_NK = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(len(y_N), 1)  # always class 0
        return Losses((self.learnt * mean).sum(), {"label": mean, "one": torch.tensor(1.0)}, logits_NK)

    def deployable(self) -> nn.Module:
        return self


class Noted:
    """A display that notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.events.append((name, epochs, steps_per_epoch, done))

    def step(self) -> None:
        self.events.append("step")

    def epoch(self, row: dict[str, Any]) -> None:
        self.events.append(row)


def images(count: int = 12, classes: int = 4) -> Split:
    return Split(
        images_NCHW=torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8), labels_N=torch.arange(count) % classes
    )


def loader(split: Split, batch_size: int) -> DeviceLoader:
    return DeviceLoader(split, NORMALISE, batch_size=batch_size, augmentations=(), crop_padding=0, seed=0)


def train(method: Method, run: Run, split: Split, recipe: TrainRecipe, epochs: int, display: Any = None) -> None:
    phase = Phase("told", method, method.deployable(), epochs, lambda module: 42.0)
    train_phase(phase, loader(split, recipe.batch_size), recipe, run, display or Noted(), StopRequest())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """An empty run folder."""
    return create_run(tmp_path, Recipe(name="loop"))


def test_one_step_of_descent_is_the_closed_form() -> None:
    method = ByLabels()
    stepper = Stepper(method, TrainRecipe(lr=99.0, momentum=0.0))
    losses = stepper.step(torch.zeros(4, 3, 2, 2), torch.tensor([1, 2, 2, 3]), 0.5)
    assert method.learnt.item() == -1.0  # 0.5 times the mean label 2; the rate is the argument's, not the optimiser's
    assert losses.total.item() == 0.0
    stepper.step(torch.zeros(4, 3, 2, 2), torch.tensor([1, 2, 2, 3]), 0.25)
    assert method.learnt.item() == -1.5  # gradients do not add up


def test_the_log_has_the_means_of_each_epoch(run: Run) -> None:
    display, recipe = Noted(), TrainRecipe(batch_size=4, lr=0.5, momentum=0.0, schedule="constant")
    split = Split(images_NCHW=images(12).images_NCHW, labels_N=torch.tensor([0] * 9 + [2] * 3))
    train(ByLabels(), run, split, recipe, 2, display)
    rows = read_log(run.log.path)
    learnt = 0.0
    for epoch, row in enumerate(rows, 1):
        losses = []
        for _, y_N in loader(split, 4).epoch(epoch - 1):
            losses.append(learnt * y_N.double().mean().item())
            learnt -= 0.5 * y_N.double().mean().item()
        assert row.pop("loss") == pytest.approx(sum(losses) / 3)
        seconds = row.pop("seconds")
        assert row.pop("images_per_s") == pytest.approx(12 / seconds)
        assert row == {
            "event": "epoch",
            "phase": "told",
            "epoch": epoch,
            "lr": 0.5,
            "label": 0.5,  # 6 / 12
            "one": 1.0,
            "train_top1": 75.0,
            "val_top1": 42.0,
        }
    assert len(rows) == 2
    steps = [logged if isinstance(logged, str) else type(logged) for logged in display.events]
    assert steps == [tuple, "step", "step", "step", dict, "step", "step", "step", dict]
    assert display.events[0] == ("told", 2, 3, 0)


def test_the_rate_follows_the_schedule(run: Run) -> None:
    recipe = TrainRecipe(batch_size=4, lr=0.8, schedule="cosine")
    train(ByLabels(), run, images(12), recipe, 2)
    rates = [row["lr"] for row in read_log(run.log.path)]  # of the last step of each epoch: 2 and 5 of 6
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * 2 / 6)), 0.4 * (1 + math.cos(math.pi * 5 / 6))])


def test_64_images_are_memorised(run: Run) -> None:
    """Noise with labels that mean nothing: only a loop that really learns gets them right."""
    split = Split(
        images_NCHW=torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8), labels_N=torch.randint(0, 10, (64,))
    )
    model = CifarResNet(8, (16, 16, 32, 64), 10)

    def accuracy() -> float:
        return 100 * float((predictions(model, split, NORMALISE) == split.labels_N).float().mean())

    assert accuracy() < 40  # chance is 10
    train(CrossEntropy(model), run, split, TrainRecipe(batch_size=16, lr=0.05), 25)
    assert accuracy() >= 98
    rows = read_log(run.log.path)
    assert rows[-1]["train_top1"] >= 95
    assert rows[-1]["ce"] < 0.2 < rows[0]["ce"]


class Diverges(ByLabels):
    """A method whose loss is no number from a step on."""

    def __init__(self, good_steps: int) -> None:
        super().__init__()
        self.left = good_steps

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        self.left -= 1
        losses = super().forward(x_NCHW, y_N)
        broken = torch.tensor(float("nan" if self.left < 0 else 0))
        return Losses(losses.total + broken, losses.parts | {"ce": broken}, losses.logits_NK)


def test_divergence_is_said_with_its_step_and_term(run: Run) -> None:
    message = r"ce is not finite from step 2 of 3 in epoch 1 of phase 'told'; nothing was saved yet\. Lower train\.lr"
    with pytest.raises(DivergenceError, match=message):
        train(Diverges(1), run, images(12), TrainRecipe(batch_size=4), 3)
    assert not run.checkpoint.exists()
    assert read_log(run.log.path) == []


def test_divergence_leaves_the_last_good_state(run: Run) -> None:
    message = rf"step 1 of 3 in epoch 2 of phase 'told'; the last good state is {run.checkpoint}"
    with pytest.raises(DivergenceError, match=message):
        train(Diverges(3), run, images(12), TrainRecipe(batch_size=4), 3)
    tensors, facts = load_tensors(run.checkpoint)
    assert (facts["epoch"], facts["batch"]) == (1, 0)
    assert all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())


def test_a_diverged_state_is_not_saved_on_a_signal_either(run: Run) -> None:
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    method = Diverges(0)
    phase = Phase("told", method, method, 1, lambda module: None)
    with pytest.raises(DivergenceError):
        train_phase(phase, loader(images(12), 4), TrainRecipe(batch_size=4), run, Noted(), stop)
    assert not run.checkpoint.exists()


def test_a_request_to_stop_is_answered_after_one_step_with_a_checkpoint(run: Run) -> None:
    stop, display = StopRequest(), Noted()
    stop.signal_name = "SIGINT"
    method = ByLabels()
    phase = Phase("told", method, method, 1, lambda module: None)
    with pytest.raises(InterruptedTraining, match=rf"Stopped by SIGINT; .*rkd-deploy train {run.folder} --resume"):
        train_phase(phase, loader(images(12), 4), TrainRecipe(batch_size=4), run, display, stop)
    assert display.events == [("told", 1, 3, 0), "step"]
    _, facts = load_tensors(run.checkpoint)
    assert (facts["phase"], facts["epoch"], facts["batch"], facts["images"]) == ("told", 0, 1, 4)


@pytest.mark.parametrize(
    "how",
    [{"momentum": 0.0}, {"momentum": 0.9}, {"nesterov": True}, {"schedule": "step", "milestones": (1,)}, {"amp": True}],
)
def test_stopped_after_every_step_it_ends_in_the_same_bits(tmp_path: Path, how: dict[str, Any]) -> None:
    split, recipe = images(12), TrainRecipe(**{"batch_size": 4, "lr": 0.05, "warmup_epochs": 0.5, **how})
    ends, logs = [], []
    for name, stops in (("whole", False), ("stopped", True)):
        run = create_run(tmp_path, Recipe(name=name))
        finished = False
        while not finished:
            torch.manual_seed(0)
            method = CrossEntropy(CifarResNet(8, (4, 4, 4, 4), 4))
            stop = StopRequest()
            stop.signal_name = "SIGTERM" if stops else None
            phase = Phase("ce", method, method.model, 2, lambda module: None)
            try:
                train_phase(phase, loader(split, 4), recipe, run, Noted(), stop)
                finished = True
            except InterruptedTraining:
                _, facts = load_tensors(run.checkpoint)
                finished = facts["epoch"] == 2
        ends.append({key: value.clone() for key, value in method.model.state_dict().items()})
        logs.append(
            [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)]
        )
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


@pytest.mark.parametrize("amp", [False, True])
def test_soft_targets_are_learnt_and_their_largest_class_counted(amp: bool) -> None:
    """Also under autocast, where logits come in bfloat16 and targets do not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x, y = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    method, sums = CrossEntropy(model), EpochSums()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        z = model(x).float()
    wanted = torch.nn.functional.cross_entropy(z, y, label_smoothing=0.3)
    stepper = Stepper(method, TrainRecipe(amp=amp))
    losses = stepper.step(x, smoothed(y, 3, 0.3), 0.1)
    sums.add(losses, smoothed(y, 3, 0.3), 1)
    assert losses.total.item() == pytest.approx(wanted.item(), abs=1e-2 if amp else 1e-6)
    assert sums.means()["train_top1"] == pytest.approx(100 * (z.argmax(1) == y).float().mean().item())

"""One phase of training: the loop that does not know the method.

A phase interrupted at any step and resumed ends in the same bits as one that was not (on a CPU): the checkpoint holds
weights, optimiser, random state, the sums of the epoch in progress and the place in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import DeviceLoader
from rkd_deploy.errors import DivergenceError, InterruptedTraining
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.checkpoint import load_tensors, save_tensors
from rkd_deploy.train.interruption import StopRequest
from rkd_deploy.train.methods.base import Losses, Method
from rkd_deploy.train.runs import Run
from rkd_deploy.train.schedule import learning_rate, sgd


class Display(Protocol):
    """What shows a person how training goes; `rkd_deploy.train.progress` has one for terminals."""

    def note(self, text: str) -> None:
        """A line about what is done before training, e.g. a measurement."""

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """A phase begins, or is resumed after `done` steps."""

    def step(self) -> None:
        """One step is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; the row is what the log has of it."""


@dataclass
class Phase:
    """One stretch of training with one method.

    Attributes:
        name: Names its log lines and its weights.
        method: What is trained.
        product: The network whose weights are kept.
        epochs: How long.
        val_top1: Accuracy of the deployable network on the held-out images in percent, or None without any.
    """

    name: str
    method: Method
    product: nn.Module
    epochs: int
    val_top1: Callable[[nn.Module], float | None]


@dataclass
class EpochSums:
    """Sums over the epoch in progress, on the device: reading them would wait for it at every step."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    correct: Tensor | None = None
    images: int = 0

    def add(self, losses: Losses, y_N: Tensor) -> None:
        """Count one batch in."""
        count = len(y_N)
        for name, value in losses.parts.items():
            weighted = value.double() * count
            self.parts[name] = weighted if name not in self.parts else self.parts[name] + weighted
        correct = (losses.logits_NK.argmax(1) == y_N).sum()
        self.correct = correct if self.correct is None else self.correct + correct
        self.images += count

    def means(self) -> dict[str, float]:
        """Means over the images so far, and the training accuracy in percent; this waits for the device."""
        means = {name: value.item() / self.images for name, value in self.parts.items()}
        return means if self.correct is None else {**means, "train_top1": 100 * self.correct.item() / self.images}


def train_phase(
    phase: Phase, loader: DeviceLoader, recipe: TrainRecipe, run: Run, display: Display, stop: StopRequest
) -> None:
    """Train one phase from where its checkpoint stands, or from the start.

    Raises:
        DivergenceError: A loss is no longer finite.
        InterruptedTraining: A signal asked to stop; the checkpoint is written.
        StorageError: A checkpoint could not be written; the one before is intact.
    """
    method, steps_per_epoch = phase.method, len(loader)
    optimizer = sgd(method, recipe)
    first_epoch, first_batch, sums = _restore(phase, optimizer, run)
    display.phase(phase.name, phase.epochs, steps_per_epoch, first_epoch * steps_per_epoch + first_batch)
    for epoch in range(first_epoch, phase.epochs):
        method.start_epoch(epoch + 1)
        method.train()
        began, seen_before = time.perf_counter(), sums.images
        for batch, (x_NCHW, y_N) in enumerate(loader.epoch(epoch, first_batch), first_batch):
            rate = learning_rate(recipe, epoch * steps_per_epoch + batch, phase.epochs, steps_per_epoch)
            sums.add(train_step(method, optimizer, x_NCHW, y_N, rate, recipe.amp), y_N)
            display.step()
            if stop.signal_name is not None and batch + 1 < steps_per_epoch:
                _check_finite(sums, phase, epoch, run)
                _save(phase, optimizer, run, epoch, batch + 1, sums)
                raise _interrupted(stop, run)
        row = _check_finite(sums, phase, epoch, run)
        seconds = time.perf_counter() - began
        row |= {
            "phase": phase.name,
            "epoch": epoch + 1,
            "lr": rate,
            "val_top1": phase.val_top1(method.deployable()),
            "seconds": seconds,
            "images_per_s": (sums.images - seen_before) / seconds,
        }
        run.log.append("epoch", **row)
        display.epoch(row)
        first_batch, sums = 0, EpochSums()
        _save(phase, optimizer, run, epoch + 1, 0, sums)
        if stop.signal_name is not None:
            raise _interrupted(stop, run)


def train_step(
    method: Method, optimizer: torch.optim.Optimizer, x_NCHW: Tensor, y_N: Tensor, rate: float, amp: bool
) -> Losses:
    """Forward, backward and update of one batch at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    autocast = torch.autocast(x_NCHW.device.type, torch.bfloat16) if amp else contextlib.nullcontext()
    with autocast:
        losses: Losses = method(x_NCHW, y_N)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return losses


def _check_finite(sums: EpochSums, phase: Phase, epoch: int, run: Run) -> dict[str, Any]:
    means: dict[str, Any] = sums.means()
    broken = [name for name, value in means.items() if not abs(value) < float("inf")]
    # The last update comes after the last loss: what it left is looked at too, before it is kept.
    if not broken and not all(bool(tensor.isfinite().all()) for tensor in phase.product.state_dict().values()):
        broken = ["a weight"]
    if broken:
        kept = f"the last good state is {run.checkpoint}" if run.checkpoint.exists() else "nothing was saved yet"
        raise DivergenceError(
            f"Training diverged: {', '.join(broken)} is not finite in epoch {epoch + 1} of phase {phase.name!r}; "
            f"{kept}. Lower train.lr or set train.warmup_epochs, and start a new run."
        )
    return means


def _interrupted(stop: StopRequest, run: Run) -> InterruptedTraining:
    return InterruptedTraining(
        f"Stopped by {stop.signal_name}; everything so far is in {run.checkpoint}. "
        f"Go on with: rkd-deploy train {run.folder} --resume"
    )


def _save(phase: Phase, optimizer: torch.optim.Optimizer, run: Run, epoch: int, batch: int, sums: EpochSums) -> None:
    tensors = {f"product/{key}": value for key, value in phase.product.state_dict().items()}
    if (auxiliary := phase.method.auxiliary()) is not None:
        tensors |= {f"auxiliary/{key}": value for key, value in auxiliary.state_dict().items()}
    state = optimizer.state_dict()["state"]
    tensors |= {f"momentum/{index}": entry["momentum_buffer"] for index, entry in state.items()}
    tensors |= {f"sum/{name}": value for name, value in sums.parts.items()}
    if sums.correct is not None:
        tensors["correct"] = sums.correct
    tensors["random"] = torch.get_rng_state()
    facts = {"phase": phase.name, "epoch": epoch, "batch": batch, "images": sums.images, "log": run.log.size()}
    save_tensors(run.checkpoint, tensors, facts)


def _restore(phase: Phase, optimizer: torch.optim.Optimizer, run: Run) -> tuple[int, int, EpochSums]:
    """Take up the checkpoint of this phase, if there is one: epoch, batch and sums to go on from."""
    tensors, facts = load_tensors(run.checkpoint) if run.checkpoint.exists() else ({}, {"phase": None})
    if facts["phase"] != phase.name:
        run.log.forget(phase.name)  # killed after its first epoch was logged and before that was saved
        return 0, 0, EpochSums()
    run.log.rewind(facts["log"])
    phase.product.load_state_dict(_under("product/", tensors))
    if (auxiliary := phase.method.auxiliary()) is not None:
        auxiliary.load_state_dict(_under("auxiliary/", tensors))
    state = optimizer.state_dict()
    momenta = _under("momentum/", tensors)
    state["state"] = {int(index): {"momentum_buffer": value} for index, value in momenta.items()}
    optimizer.load_state_dict(state)
    torch.set_rng_state(tensors["random"])
    device = next(phase.product.parameters()).device
    sums = EpochSums(images=facts["images"])
    sums.parts = {name: value.to(device) for name, value in _under("sum/", tensors).items()}
    sums.correct = tensors["correct"].to(device) if "correct" in tensors else None
    return facts["epoch"], facts["batch"], sums


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

"""The loop over the epochs of one phase; it knows nothing of the method.

A phase interrupted at any step and resumed ends in the same bits as one that was not (on a CPU): the checkpoint
(`state.py`) holds weights, optimiser, random state, the sums of the epoch in progress and the place in it.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from torch import Tensor

from rkd_deploy.data.loader import Loader
from rkd_deploy.errors import DivergenceError, InterruptedTraining, command_line
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.signals import StopRequest
from rkd_deploy.train import state
from rkd_deploy.train.distributed import ALONE, Group, StopVote
from rkd_deploy.train.passes import Speedups
from rkd_deploy.train.recording import EagerSteps, RecordedSteps
from rkd_deploy.train.runs import Run
from rkd_deploy.train.state import EpochSums, Phase
from rkd_deploy.train.stepping import Average, Stepper, learning_rate


class Display(Protocol):
    """What shows a person how training goes; `rkd_deploy.train.display` has one for terminals."""

    def note(self, text: str) -> None:
        """Show a line about what is done before training, e.g. a measurement."""

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Show that a phase begins, or is resumed after `done` steps."""

    def step(self) -> None:
        """Show that one more step of the phase is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Show that an epoch is done; the row is what the log has of it."""


def train_phase(
    phase: Phase,
    loader: Loader,
    recipe: TrainRecipe,
    run: Run,
    display: Display,
    stop: StopRequest,
    group: Group = ALONE,
) -> dict[str, Tensor] | None:
    """Train one phase from where its checkpoint stands, or from the start.

    Args:
        phase: What is trained.
        loader: Gives this process's share of every batch.
        recipe: Table `[train]`.
        run: Where log and checkpoint go; only rank 0 writes.
        display: Shows progress.
        stop: Whether a signal asked to stop.
        group: The processes that share every batch.

    Returns:
        The averaged weights of the product, where the recipe asks for an average.

    Raises:
        DivergenceError: A loss is no longer finite.
        InterruptedTraining: A signal asked to stop; the checkpoint is written.
        StorageError: A checkpoint could not be written; the one before is intact.
    """
    return _PhaseRun(phase, loader, recipe, run, display, stop, group).train()


_GO_ON, _SAVE, _STOP = range(3)


class _PhaseRun:
    """The loop of one phase, with what it holds from epoch to epoch; arguments are those of `train_phase`."""

    def __init__(
        self,
        phase: Phase,
        loader: Loader,
        recipe: TrainRecipe,
        run: Run,
        display: Display,
        stop: StopRequest,
        group: Group,
    ) -> None:
        self.phase, self.loader, self.recipe, self.run = phase, loader, recipe, run
        self.display, self.stop, self.group = display, stop, group
        self.average = None if recipe.ema_decay is None else Average(phase.product, recipe.ema_decay)
        self.stepper = Stepper(phase.method, recipe, group)
        eager = EagerSteps(self.stepper, loader)
        self.steps: EagerSteps | RecordedSteps = eager
        if recipe.records_steps(next(phase.method.parameters()).device.type, group.size):
            speedups = Speedups(compiled=recipe.compile)
            self.steps = RecordedSteps(phase.method, self.stepper.optimizer, recipe, loader, speedups, otherwise=eager)
        self.stop_vote = StopVote(group)
        self.saved_at = time.monotonic()

    def train(self) -> dict[str, Tensor] | None:
        """Train to the end of the phase."""
        phase, steps = self.phase, len(self.loader)
        epoch, batch, sums = state.restore(phase, self.stepper.optimizer, self.average, self.run, self.group)
        self.display.phase(phase.name, phase.epochs, steps, epoch * steps + batch)
        for number in range(epoch, phase.epochs):
            self._epoch(number, batch, sums)
            batch, sums = 0, EpochSums()
        return None if self.average is None else self.average.weights()

    def _epoch(self, epoch: int, first_batch: int, sums: EpochSums) -> None:
        self.stepper.start_epoch(epoch + 1)
        began, images_before, steps = time.perf_counter(), sums.images, len(self.loader)
        rates = [learning_rate(self.recipe, epoch * steps + batch, self.phase.epochs, steps) for batch in range(steps)]
        for batch, _ in enumerate(self.steps.epoch(epoch, first_batch, sums, rates), first_batch):
            if self.average is not None:
                self.average.update()
            self.display.step()
            # Not after the last batch: the epoch's end saves anyhow, and `finish` collects the votes there.
            if batch + 1 < steps and (verdict := self.stop_vote.vote(self._wish())) != _GO_ON:
                self._check_finite(sums.over(self.group), epoch)
                self._save((epoch, batch + 1), sums)
                if verdict == _STOP:
                    raise self._interrupted()
        row = self._check_finite(sums.over(self.group), epoch)  # waits for the device, which the steps do not
        # After a resume the sums hold images of before it, which took none of these seconds.
        seconds, images = time.perf_counter() - began, (sums.images - images_before) * self.group.size
        row |= {"phase": self.phase.name, "epoch": epoch + 1, "lr": rates[-1]}
        # On rank 0 alone, with the statistics of batch norm that ship: those of the other ranks are dropped.
        row |= self.group.on_main(self._validate)
        row |= {"seconds": seconds, "images_per_s": images / seconds}
        if isinstance(self.steps, RecordedSteps) and (choices := self.steps.news()):
            self.run.log.append("recorded", phase=self.phase.name, **choices)
            if failure := choices.get("failure"):
                self.display.note(f"Steps are not recorded as a CUDA graph, which is slower: {failure}")
        self.group.on_main(lambda: self.run.log.append("epoch", **row))
        self.display.epoch(row)
        self._save((epoch + 1, 0), EpochSums())
        if self.stop_vote.finish(self._wish()) == _STOP:
            raise self._interrupted()

    def _validate(self) -> dict[str, float | None]:
        network = self.phase.method.deployable()
        accuracies = {"val_top1": self.phase.val_top1(network)}
        if self.average is not None:
            with self.average.in_place():
                accuracies["val_top1_ema"] = self.phase.val_top1(network)
        return accuracies

    def _wish(self) -> int:
        """What this process votes for after a step: to go on, to save or to stop."""
        if self.stop.signal_name is not None:
            return _STOP
        # One clock decides when to save: those of other machines may differ.
        old = self.group.rank == 0 and time.monotonic() - self.saved_at >= 60 * self.recipe.checkpoint_minutes
        return _SAVE if old else _GO_ON

    def _check_finite(self, sums: EpochSums, epoch: int) -> dict[str, Any]:
        """Means of the epoch for the log.

        Raises:
            DivergenceError: A value is not finite; the message names the first step that had one.
        """
        where = f"epoch {epoch + 1} of phase {self.phase.name!r}"
        if (bad := sums.first_bad()) is not None:
            broken, where = ", ".join(bad[1]), f"step {bad[0]} of {len(self.loader)} in {where}"
        # The last update comes after the last loss: what it left is looked at too, before it is kept.
        elif not all(bool(tensor.isfinite().all()) for tensor in self.phase.product.state_dict().values()):
            broken = "a weight"
        else:
            return dict(sums.means())
        checkpoint = self.run.checkpoint
        saved = f"the last good state is {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
        raise DivergenceError(
            f"Training diverged: {broken} is not finite from {where}; {saved}. "
            "Lower train.lr or set train.warmup_epochs or train.clip_norm, and start a new run."
        )

    def _save(self, place: tuple[int, int], sums: EpochSums) -> None:
        whole = sums.over(self.group)  # by every process, before the first one is left alone with writing
        self.group.on_main(
            lambda: state.save(self.phase, self.stepper.optimizer, self.average, self.run, place, whole),
        )
        self.saved_at = time.monotonic()

    def _interrupted(self) -> InterruptedTraining:
        return InterruptedTraining(
            f"Stopped by {self.stop.signal_name or 'a signal to another process'}; everything so far is in "
            f"{self.run.checkpoint}. Go on with: {command_line('train', self.run.folder, '--resume')}"
        )

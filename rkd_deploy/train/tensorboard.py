"""The log for TensorBoard: `tensorboard --logdir runs` shows every phase of every run as it goes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rkd_deploy.errors import require
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.storage import storage_error
from rkd_deploy.train.loop import Display
from rkd_deploy.train.runs import Run

_NO_VALUES = ("event", "phase", "epoch")


def with_tensorboard(display: Display, run: Run, recipe: TrainRecipe) -> Display:
    """The display, and TensorBoard beside it where the recipe wants that and the package is installed.

    Raises:
        MissingDependencyError: The recipe wants it, and the package is not installed.
    """
    if recipe.tensorboard:
        require("tensorboard", "tensorboard")
    wanted = find_spec("tensorboard") is not None if recipe.tensorboard is None else recipe.tensorboard
    return TensorBoard(display, run) if wanted else display


class TensorBoard:
    """A display that writes each epoch to tensorboard/PHASE in the run folder, and passes everything on.

    Args:
        display: Passed on to.
        run: Whose folder.
    """

    def __init__(self, display: Display, run: Run) -> None:
        self._display, self._run = display, run
        self._phase, self._next_epoch = "", 1
        self._writer: Any = None

    def note(self, text: str) -> None:
        """Pass on."""
        self._display.note(text)

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Remember where it begins: after a kill, epochs from there on are written again and hide the old ones."""
        self.close()
        self._phase, self._next_epoch = name, 1 + done // steps_per_epoch
        self._display.phase(name, epochs, steps_per_epoch, done)

    def step(self) -> None:
        """Nothing but passing it on."""
        self._display.step()

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the values of an epoch.

        Raises:
            StorageError: The disk is full.
        """
        folder = self._run.folder / "tensorboard" / self._phase
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(folder, purge_step=self._next_epoch)
            for key, value in row.items():
                if key not in _NO_VALUES and value is not None:
                    self._writer.add_scalar(key, value, row["epoch"])
            self._writer.flush()
        except OSError as error:
            raise storage_error(folder, error) from error
        self._display.epoch(row)

    def close(self) -> None:
        """Close the file of the phase."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

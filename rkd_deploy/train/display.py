"""Shows how training goes: bar and lines, tables at the end, TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rkd_deploy.errors import require
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.storage import storage_error
from rkd_deploy.text import visible
from rkd_deploy.train.facts import PhaseMetrics, RunFacts, RunMetrics
from rkd_deploy.train.loop import Display
from rkd_deploy.train.networks import PARTS
from rkd_deploy.train.runs import Run
from rkd_deploy.train.verdict import of_metrics, of_series

if TYPE_CHECKING:
    from rich.console import Console

    from rkd_deploy.train.runs import Series


class Silent:
    """A display that shows nothing."""

    def note(self, text: str) -> None:
        """Ignore a line of what is done before training."""

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Ignore the beginning of a phase."""

    def step(self) -> None:
        """Ignore a step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Ignore the end of an epoch."""


class ProgressDisplay:
    """A bar per phase on standard error, and above it one line per epoch (at most about twenty of a phase)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: Any = None
        self._every = 1
        self._epochs = 0

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line of what is done before training; control characters and mark-up in it do nothing."""
        self.console.print(visible(text), highlight=False, markup=False)

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Open the bar of a phase."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=epochs * steps_per_epoch, completed=done)
        self._every, self._epochs = max(1, epochs // 20), epochs

    def step(self) -> None:
        """Move the bar of the phase by one step."""
        self._bars.advance(self._task)

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of an epoch."""
        if row["epoch"] % self._every and row["epoch"] != self._epochs:
            return
        shown = [f"{row['phase']:>9} {row['epoch']:>3}/{self._epochs}"]
        known = ("event", "phase", "epoch", "lr", "loss", "train_top1", "val_top1", "seconds", "images_per_s")
        shown += [f"{name} {value:.4f}" for name, value in row.items() if name not in known]
        if "train_top1" in row:  # not before the last stage of scheme progressive
            shown.append(f"train {row['train_top1']:.2f} %")
        if row["val_top1"] is not None:
            shown.append(f"val {row['val_top1']:.2f} %")
        shown.append(f"{row['images_per_s']:,.0f} images/s")
        self.console.print(visible("  ".join(shown)), highlight=False, markup=False)


def print_series(series: Series, console: Console) -> None:
    """Print the table that ends a series of seeds."""
    from rich.table import Table

    images = next(iter(series.parts.values()))["test_images"]
    table = Table(title=f"Top-1 in %, seeds {', '.join(map(str, series.seeds))}, {images:,} test images")
    for title in ("", "Mean", "Std", *(f"Seed {seed}" for seed in series.seeds)):
        table.add_column(title, justify="right" if title else "left")
    for part in (name for name in reversed(PARTS) if name in series.parts):
        row = series.parts[part]
        cells = [row["mean"], row["std"], *row["test_top1"]]
        table.add_row(PARTS[part], *(f"{value:.2f}" for value in cells))
    console.print(table)
    if (verdict := of_series(series.parts, PARTS)) is not None:
        console.print(verdict.sentence())


def _print_phases(phases: Mapping[str, PhaseMetrics], console: Console) -> None:
    """Print last and best epoch of each phase: the last one ships, the best one tells how much was lost by that."""
    from rich.table import Table
    from rich.text import Text

    # Without held-out images there is none, and scheme progressive classifies from its last stage on.
    held_out = {name: phase for name, phase in phases.items() if phase.val_top1_last is not None}
    if not held_out:
        return
    table = Table(title="Held-out images, top-1 in %")
    for title in ("", "Epochs", "Last epoch", "Best epoch"):
        table.add_column(title, justify="right" if title else "left")
    for name, phase in held_out.items():
        best = f"{phase.val_top1_best:.2f} ({phase.best_epoch})"
        table.add_row(Text(visible(name)), str(phase.epochs), f"{phase.val_top1_last:.2f}", best)
    console.print(table)


def print_parts(metrics: RunMetrics, facts: RunFacts, console: Console) -> None:
    """Print the table that ends a training run: every network of metrics.json, and the account of the budget."""
    from rich.table import Table
    from rich.text import Text

    images = next(iter(metrics.parts.values())).test_images
    table = Table(title=Text(visible(f"{facts.data}, {images:,} test images")))
    table.add_column("")
    for title in ("Top-1, %", "MACs, M", "Parameters, M"):
        table.add_column(title, justify="right")
    for part, name in reversed(PARTS.items()):
        if (row := metrics.parts.get(part)) is not None:
            table.add_row(name, f"{row.test_top1:.2f}", f"{row.macs / 1e6:.2f}", f"{row.parameters / 1e6:.3f}")
    _print_phases(metrics.phases, console)
    console.print(table)
    if left_out := (facts.sources or {}).get("left out"):
        console.print(visible(f"Left out, because their suffix is no image's: {left_out}."))
    if facts.skipped:
        console.print(f"{facts.skipped:,} broken images were left out; facts.json names the first of them.")
    if (verdict := of_metrics(metrics, PARTS)) is not None:
        console.print(verdict.sentence())
    if (account := facts.separation) is None:  # a baseline has none
        return
    console.print(f"Budget: S + A cost {account.cost:,} of S0's {account.budget:,} {account.unit}.")
    if (measured := account.measured_ratio) is not None:
        console.print(
            f"Latency of S + A over that of S0, measured: {measured[0]:.3f} at worst, fused at level {measured[1]}."
        )


_NO_VALUES = ("event", "phase", "epoch")


def with_tensorboard(display: Display, run: Run, recipe: TrainRecipe) -> Display:
    """A display that also writes for TensorBoard, where the recipe wants that and the package is installed.

    Raises:
        MissingDependencyError: The recipe asks for TensorBoard, and the package is not installed.
    """
    if recipe.tensorboard:
        require("tensorboard", "tensorboard")
    wanted = find_spec("tensorboard") is not None if recipe.tensorboard is None else recipe.tensorboard
    return TensorBoard(display, run) if wanted else display


class TensorBoard:
    """A display that writes each epoch to tensorboard/PHASE in the run folder, and passes everything on.

    Args:
        display: Gets everything passed on.
        run: The run whose folder is written into.
    """

    def __init__(self, display: Display, run: Run) -> None:
        self._display, self._run = display, run
        self._phase, self._next_epoch = "", 1
        self._writer: Any = None

    def note(self, text: str) -> None:
        """Pass a line of what is done before training on."""
        self._display.note(text)

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Note where a phase begins: after a kill, epochs from there on are written again and hide the old ones."""
        self.close()
        self._phase, self._next_epoch = name, 1 + done // steps_per_epoch
        self._display.phase(name, epochs, steps_per_epoch, done)

    def step(self) -> None:
        """Pass a step on."""
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
        """Close the event file of the phase."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

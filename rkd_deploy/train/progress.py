"""How training looks to a person: a bar in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rkd_deploy.train.networks import PARTS

if TYPE_CHECKING:
    from rich.console import Console

    from rkd_deploy.train.series import Series


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing."""


class Progress:
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

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line of what is done before training."""
        self.console.print(text, highlight=False)

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Open the bar of a phase."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=epochs * steps_per_epoch, completed=done)
        self._every, self._epochs = max(1, epochs // 20), epochs

    def step(self) -> None:
        """Move the bar."""
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
        self.console.print("  ".join(shown), highlight=False)


def print_series(series: Series, console: Console) -> None:
    """The table that ends a series of seeds."""
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


def _print_phases(phases: dict[str, Any], console: Console) -> None:
    """The last epoch is what is kept; the best one tells how much was lost by that."""
    from rich.table import Table

    # Without held-out images there is none, and scheme progressive classifies from its last stage on.
    held_out = {name: phase for name, phase in phases.items() if phase["val_top1_last"] is not None}
    if not held_out:
        return
    table = Table(title="Held-out images, top-1 in %")
    for title in ("", "Epochs", "Last epoch", "Best epoch"):
        table.add_column(title, justify="right" if title else "left")
    for name, phase in held_out.items():
        best = f"{phase['val_top1_best']:.2f} ({phase['best_epoch']})"
        table.add_row(name, str(phase["epochs"]), f"{phase['val_top1_last']:.2f}", best)
    console.print(table)


def print_parts(metrics: dict[str, Any], facts: dict[str, Any], console: Console) -> None:
    """The table that ends a training run: every network of metrics.json, and the account of the budget."""
    from rich.table import Table

    images = next(iter(metrics["parts"].values()))["test_images"]
    table = Table(title=f"{facts['data']}, {images:,} test images")
    table.add_column("")
    for title in ("Top-1, %", "MACs, M", "Parameters, M"):
        table.add_column(title, justify="right")
    for part, name in reversed(PARTS.items()):
        if (row := metrics["parts"].get(part)) is not None:
            table.add_row(name, f"{row['test_top1']:.2f}", f"{row['macs'] / 1e6:.2f}", f"{row['parameters'] / 1e6:.3f}")
    _print_phases(metrics["phases"], console)
    console.print(table)
    if facts.get("skipped"):
        console.print(f"{facts['skipped']:,} broken images were left out; facts.json names the first of them.")
    budget = facts.get("separation")  # a baseline has none
    if budget is not None:
        console.print(f"Budget: S + A cost {budget['cost']:,} of S0's {budget['budget']:,} {budget['unit']}.")
        if (latency := budget.get("latency")) is not None:
            console.print(
                f"Latency of S + A over that of S0, measured: {latency['fused']['worst_ratio']:.3f} at worst, "
                f"fused at level {latency['fused']['level']}."
            )

"""How training looks to a person: a bar in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


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
        known = ("phase", "epoch", "lr", "train_top1", "val_top1", "seconds", "images_per_s")
        shown += [f"{name} {value:.4f}" for name, value in row.items() if name not in known]
        shown.append(f"train {row['train_top1']:.2f} %")
        if row["val_top1"] is not None:
            shown.append(f"val {row['val_top1']:.2f} %")
        shown.append(f"{row['images_per_s']:,.0f} images/s")
        self.console.print("  ".join(shown), highlight=False)


def print_parts(metrics: dict[str, Any], facts: dict[str, Any], console: Console) -> None:
    """The table that ends a training run: every network of metrics.json, and the account of the budget."""
    from rich.table import Table

    names = {"teacher": "T", "s0": "S0", "student": "S alone", "fused": "S + A"}
    images = next(iter(metrics["parts"].values()))["test_images"]
    table = Table(title=f"{facts['data']}, {images:,} test images")
    table.add_column("")
    for title in ("Top-1, %", "MACs, M", "Parameters, M"):
        table.add_column(title, justify="right")
    for part, name in names.items():
        if (row := metrics["parts"].get(part)) is not None:
            table.add_row(name, f"{row['test_top1']:.2f}", f"{row['macs'] / 1e6:.2f}", f"{row['parameters'] / 1e6:.3f}")
    console.print(table)
    budget = facts.get("separation")  # a baseline has none
    if budget is not None:
        console.print(f"Budget: S + A cost {budget['cost']:,} of S0's {budget['budget']:,} {budget['unit']}.")
        if (latency := budget.get("latency")) is not None:
            console.print(
                f"Latency of S + A over that of S0, measured: {latency['fused']['worst_ratio']:.3f} at worst."
            )

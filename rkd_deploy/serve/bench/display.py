"""What a person sees while a bench runs, and what an export with early exit reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rkd_deploy.serve.bench.timing import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def status(text: str) -> Iterator[Progress]:
    """A line on standard error that moves while the block runs; in anything but a terminal it says nothing.

    Args:
        text: What is being done.

    Yields:
        To be told which model is measured, and how far.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) as line:

        def update(name: str, share: float) -> None:
            line.update(f"{text}: {name}, {share:.0%}")

        yield update


def print_exits(report: Mapping[str, Any], console: Console) -> None:
    """The table of a card's `early_exit`: what each threshold saves and costs."""
    from rich.table import Table

    table = Table(title=f"Early exit at {report['threshold']:g} ({report['chosen_on']})")
    for title in ("images", "threshold", "leave after S, A_1, .., %", "mean MACs, M", "saved, %", "Top-1, %"):
        table.add_column(title, justify="right")
    for name in ("held_out", "test"):
        for row in report.get(name, ()):
            shares = " ".join(f"{100 * share:.1f}" for share in row["shares"])
            cells = (shares, f"{row['macs'] / 1e6:.3f}", f"{100 * row['saved']:.1f}", f"{row['top1']:.2f}")
            table.add_row(name.replace("_", "-"), f"{row['threshold']:g}", *cells)
    console.print(table)

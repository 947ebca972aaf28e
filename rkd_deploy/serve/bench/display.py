"""What a person sees while a bench runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rkd_deploy.serve.bench.timing import Progress


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

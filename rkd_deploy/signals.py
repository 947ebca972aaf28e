"""Handles Ctrl-C (SIGINT) and SIGTERM while something runs that must not be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], Any], signals: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """Send signals to a handler while the block runs.

    Only the main thread may set handlers: in any other one the block runs, and signals go where they went before.

    Args:
        handler: As for `signal.signal`; `signal.default_int_handler` raises KeyboardInterrupt.
        signals: Those that go to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """A block in which SIGINT and SIGTERM only set `signal_name`; a second one acts as usual.

    Attributes:
        signal_name: Name of the signal that asked to stop, e.g. ``"SIGTERM"``; None: none did.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handling = ExitStack()

    def __enter__(self) -> StopRequest:
        self._handling.enter_context(handling(self._note))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._handling.close()

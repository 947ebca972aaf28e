"""Ctrl-C (SIGINT) and SIGTERM while something runs that must not be lost. Standard library only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], Any], signals: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """While the block runs, signals go to a handler.

    Only the main thread may set handlers: in any other one the block runs, and signals go where they went before.

    Args:
        handler: As for `signal.signal`; `signal.default_int_handler` raises KeyboardInterrupt.
        signals: Which ones.
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

"""Ctrl-C and SIGTERM as a request that the loop answers between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType, TracebackType

from rkd_deploy.signals import handling


class StopRequest:
    """While the block runs, SIGINT and SIGTERM only set `signal_name`; a second one acts as usual."""

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

"""TensorRT's progress reports, told to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, and how far it is, 0 to 1."""


def monitor(trt: Any, progress: Progress | None) -> Any:
    """An IProgressMonitor that reports the outermost phase and its steps; None where nobody listens.

    TensorRT nests phases and calls from several threads; the outermost one is the build.
    """
    if progress is None:
        return None
    tell = progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def stop(self, number: int, frame: FrameType | None) -> None:
            """For a signal: the build ends with its next step."""
            self.interrupted = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = max(num_steps, 1)
                self._tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._tell(phase_name, min(1.0, (step + 1) / self._steps[phase_name]))
            return not self.interrupted  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            if self._steps.pop(phase_name, None) is not None:
                self._tell(phase_name, 1.0)

        def _tell(self, phase_name: str, share: float) -> None:
            try:
                tell(phase_name, share)
            except KeyboardInterrupt:  # must not travel through the library, which knows no exceptions of Python's
                self.interrupted = True

    return Monitor()

"""TensorRT's own times of the layers of an engine."""

from __future__ import annotations

from typing import Any


def layer_profiler(trt: Any) -> Any:
    """An IProfiler that keeps what it is told in `times`: name and milliseconds of each layer, in the order they run.

    Attached to an execution context, it makes each run wait for its end and tell its layers then; a captured graph
    would tell nothing.
    """

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms))

    return Profiler()

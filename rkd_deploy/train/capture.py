"""CUDA graphs: captures what a function does on the device, and times its replay."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

_WARM_UPS = 3  # libraries choose their kernels and take their workspaces before anything is recorded
_REPLAYS = 10


def new_stream() -> torch.cuda.Stream:
    """A stream on the current device."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def captured(
    call: Callable[[], object], stream: torch.cuda.Stream, after: Callable[[], None] = lambda: None
) -> torch.cuda.CUDAGraph:
    """A graph of what a function does on the device.

    Args:
        call: Called a few times first.
        stream: Where it is called and captured: libraries have workspaces for each stream.
        after: Called after each call and after the capture, e.g. to undo what it changed.
    """
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call()
            after()
    current.wait_stream(stream)
    gc.collect()  # what dead cycles hold of an earlier graph is not given back in the middle of a capture
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins the loader's memory, may go on calling CUDA.
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # a capture that breaks does not give it back
        raise
    after()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, before: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of a replay on the device.

    Args:
        graph: Replayed a few times.
        before: Called before each replay.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # The first two are not timed: a graph is uploaded to the device at its first replay.
    for number in range(_REPLAYS + 2):
        if number == 2:
            start.record()
        before()
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _REPLAYS

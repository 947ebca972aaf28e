"""PyTorch's CUDA graphs on a machine without a GPU: what runs during a capture is written down, and replayed.

As on a GPU, a capture fixes memory: a replay reads the tensors that were read, writes those that were written, and
knows nothing of tensors made since. So an input that was not copied into place, or a graph of another shape, gives a
wrong answer. Unlike a GPU, it runs while it captures.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.steps, self.replays = [], 0

    def replay(self):
        self.replays += 1
        with torch.inference_mode():
            for function, arguments, options, written in self.steps:
                again = function(*arguments, **options)
                for value, place in zip(tree_leaves(again), tree_leaves(written), strict=True):
                    if isinstance(value, torch.Tensor) and value.data_ptr() != place.data_ptr():  # else a view
                        place.copy_(value)


class _Writing(TorchDispatchMode):
    def __init__(self, graph, capture_error_mode, stream=None):
        assert capture_error_mode == "thread_local"
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.graph.steps.append((function, arguments, options or {}, result))
        return result


class Stream:
    """In place of torch.cuda.Stream."""

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Event:
    """In place of torch.cuda.Event: everything takes a millisecond."""

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        assert isinstance(other, Event)
        return 1.0


def install(monkeypatch):
    """One simulated device for PyTorchBackend and training; gives the graphs that are made, as they are made."""
    graphs = []

    def make():
        graphs.append(Graph())
        return graphs[-1]

    monkeypatch.setattr("rkd_deploy.backends.pytorch._place", lambda device: torch.device("cpu"))
    for name, value in {
        "CUDAGraph": make,
        "graph": _Writing,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs

"""The passes of one step as a CUDA graph: one launch instead of thousands, for networks too small to fill a GPU.

Everything on a step's way from batch to gradients is recorded once, the frozen teacher's pass included, and replayed on
buffers that never move. Written after PyTorch's notes on CUDA graphs; the optimiser stays outside, because its rate
changes and it is one launch anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rkd_deploy.train.methods.base import Losses, Method

_WARM_UPS = 3  # libraries choose their kernels and take their workspaces before anything is recorded


class GraphedPasses:
    """Forward and backward passes of batches of one shape; recorded anew when the shape changes.

    Args:
        method: Its gradients are what a replay writes.
        passes: Forward and backward pass of a batch, eagerly.
    """

    def __init__(self, method: Method, passes: Callable[[Tensor, Tensor], Losses]) -> None:
        self._method, self._passes = method, passes
        self._graph: torch.cuda.CUDAGraph | None = None
        self._x: Tensor
        self._y: Tensor
        self._losses: Losses

    def __call__(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """Gradients and losses of this batch. The tensors that come back are overwritten by the next call."""
        if self._graph is None or self._x.shape != x_NCHW.shape or self._y.shape != y_N.shape:
            self._record(x_NCHW, y_N)
        assert self._graph is not None
        self._x.copy_(x_NCHW)
        self._y.copy_(y_N)
        self._graph.replay()
        return self._losses

    def forget(self) -> None:
        """Record anew at the next call."""
        self._graph = None

    def _record(self, x_NCHW: Tensor, y_N: Tensor) -> None:
        self._graph = None  # gives the memory of the one before back
        self._x, self._y = x_NCHW.clone(), y_N.clone()
        statistics = [(buffer, buffer.clone()) for buffer in self._method.buffers()]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._method.zero_grad(set_to_none=True)
                self._passes(self._x, self._y)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, before in statistics:  # the warm-up moved batch norm's averages: it was no training
            buffer.copy_(before)
        self._method.zero_grad(set_to_none=True)  # so that the graph's backward pass writes gradients, not adds them
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = self._passes(self._x, self._y)

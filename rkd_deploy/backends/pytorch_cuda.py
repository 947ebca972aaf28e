"""PyTorch on CUDA: exact float32, captured graphs, limits of memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rkd_deploy.errors import UsageError

_WARM_UPS = 3  # libraries choose their kernels and take their workspaces before anything is recorded


class ExactFloat32:
    """A context manager in which float32 is float32: TF32, PyTorch's default for convolutions, is off on CUDA.

    The setting is the process's, so it is put back as it was when the last of the threads inside has left. It is
    changed by the older of PyTorch's two interfaces, which keeps both in agreement: with one changed alone, reading the
    other is an error.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: tuple[str, str, str] = ("none", "none", "none")

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _precisions()
                self._allow(self._before, False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._allow(self._before, True)

    def _allow(self, before: tuple[str, str, str], tf32: bool) -> None:
        """Change what was TF32 before, and nothing else."""
        conv, rnn, matmul = before
        if "tf32" in (conv, rnn):
            torch.backends.cudnn.allow_tf32 = tf32
        if matmul == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = tf32
        if tf32 and conv != rnn:  # by the newer interface: the older has one setting for both
            cudnn: Any = torch.backends.cudnn
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn


exact_float32 = ExactFloat32()


def _precisions() -> tuple[str, str, str]:
    """PyTorch's float32 settings of convolutions, recurrent layers and matrix products: "tf32", "ieee" or "none"."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision


class RecordedRun:
    """One input shape's run as a CUDA graph: it reads and writes the same memory each time.

    Reference: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

    Args:
        run: Images to logits, both on the device.
        x: An input.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.clone()
        with torch.cuda.device(x.device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    run(self._x)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: another stream's model, or a loader that pins memory.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = run(self._x)

    @property
    def shape(self) -> torch.Size:
        """Shape of the input."""
        return self._x.shape

    def run(self, x: Tensor) -> Tensor:
        """Logits of another input; the next run overwrites them."""
        self._x.copy_(x)
        self.replay()
        return self._logits

    def replay(self) -> None:
        """Start a run of the input that is in the graph's memory."""
        self._graph.replay()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Enqueue what runs inside on this stream, with exact float32."""
    with torch.cuda.stream(stream), exact_float32:
        yield


def limit_memory(place: torch.device, limit: int) -> None:
    """Let PyTorch take no more than so many bytes of a device in this process.

    Raises:
        UsageError: The device has less.
    """
    total = torch.cuda.mem_get_info(place)[1]
    if limit > total:
        raise UsageError(
            f"memory_limit is {limit:,} bytes, and cuda:{place.index or 0} has {total:,}. Give at most that."
        )
    torch.cuda.set_per_process_memory_fraction(limit / total, place)

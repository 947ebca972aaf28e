"""The part of the CUDA runtime that an engine needs: memory, a stream, copies, graphs.

Through cuda-bindings (NVIDIA's own), whose functions give a tuple of the error and the results.
Reference: CUDA Runtime API, https://docs.nvidia.com/cuda/cuda-runtime-api
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkd_deploy.backends.protocol import Array
from rkd_deploy.errors import BackendError, MissingDependencyError


@dataclass(frozen=True)
class Gpu:
    """A CUDA device, as its driver describes it."""

    index: int
    name: str
    capability: str
    """Compute capability, e.g. "9.0"."""
    driver: int
    """CUDA version of the driver, as 13020 for 13.2."""


def runtime() -> Any:
    """The bindings of the CUDA runtime.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "cuda-bindings, which reaches the GPU, is needed here and is not installed. "
            "Install it with: pip install cuda-bindings"
        ) from error


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; give its one result, a tuple of several, or None.

    Raises:
        BackendError: It failed; the message holds the function and CUDA's reason.
    """
    cudart = runtime()
    status, *results = getattr(cudart, function)(*arguments)
    if status != cudart.cudaError_t.cudaSuccess:
        text = cudart.cudaGetErrorString(status)[1]
        words = text.decode() if isinstance(text, bytes) else str(text)
        raise BackendError(f"CUDA: {function} failed: {words} ({getattr(status, 'name', status)}).")
    return results[0] if len(results) == 1 else tuple(results) or None


def gpu_count() -> int:
    """Number of CUDA devices.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        BackendError: There is no driver, or it is older than the CUDA runtime.
    """
    return int(call("cudaGetDeviceCount"))


def find_gpu(index: int, *, needed: bool = True) -> Gpu | None:
    """Look a CUDA device up by its index.

    Args:
        index: From 0.
        needed: False gives None where there is no such device.

    Raises:
        BackendError: It is needed, and is not there.
    """
    try:
        # Asked first: cudaGetDeviceProperties of a device that is not there says no more than "invalid device ordinal".
        count = gpu_count()
        if index >= count:
            raise BackendError(f"there are {count}, counted from 0.")
    except BackendError as error:
        if not needed:
            return None
        raise BackendError(f"CUDA device {index} cannot be used here: {error} Check with nvidia-smi.") from error
    properties = call("cudaGetDeviceProperties", index)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(index, name.rstrip("\0"), capability, int(call("cudaDriverGetVersion")))


class Stream:
    """A CUDA stream beside the default one, which waits for every other and cannot be captured."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Give the stream back to CUDA; what is enqueued on it must have ended."""
        call("cudaStreamDestroy", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What a function enqueues, as a graph; nothing of it runs.

        Raises:
            BackendError: Something in it cannot be captured.
        """
        cudart = runtime()
        # Thread-local: what other threads do on other streams meanwhile is no part of it and no error.
        call("cudaStreamBeginCapture", self.handle, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            abandoned = cudart.cudaStreamEndCapture(self.handle)[1]  # the stream must leave the capture all the same
            if abandoned is not None and int(abandoned):
                cudart.cudaGraphDestroy(abandoned)
            raise
        captured = call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(call("cudaGraphInstantiate", captured, 0))
        finally:
            call("cudaGraphDestroy", captured)


class Graph:
    """A captured run, started with one call."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Enqueue the captured run on its stream, with one call."""
        call("cudaGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Give the graph back to CUDA."""
        call("cudaGraphExecDestroy", self._handle)


class Buffer:
    """A tensor's memory on the device, and the pinned memory on the host that it is copied from or to.

    Pinned, because only such copies run beside other work and can be captured into a graph.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.bytes = int(np.prod(shape)) * dtype.itemsize
        self.device = 0
        self._pinned = 0
        with _freed_on_error(self):
            self.device = int(_allocate("cudaMalloc", self.bytes))
            self._pinned = int(_allocate("cudaHostAlloc", self.bytes, runtime().cudaHostAllocDefault))
        # A view of CUDA's memory, which NumPy neither owns nor frees.
        memory = (ctypes.c_byte * self.bytes).from_address(self._pinned)
        self.host: Array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy from host to device."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", self.device, self._pinned, self.bytes, kind, stream.handle)

    def download(self, stream: Stream) -> None:
        """Enqueue the copy from device to host."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", self._pinned, self.device, self.bytes, kind, stream.handle)

    def close(self) -> None:
        """Give the memory on device and host back; `host` must not be used afterwards."""
        # Forgotten before they are freed: a second close, after one that failed half way, must not free twice.
        device, pinned, self.device, self._pinned = self.device, self._pinned, 0, 0
        if device:
            call("cudaFree", device)
        if pinned:
            call("cudaFreeHost", pinned)


def _allocate(function: str, size: int, *flags: Any) -> Any:
    try:
        return call(function, size, *flags)
    except BackendError as error:
        raise BackendError(
            f"{error} {size:,} bytes were asked for. Use a smaller batch, or free memory: nvidia-smi shows whose it is."
        ) from error


@contextmanager
def _freed_on_error(buffer: Buffer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        buffer.close()
        raise

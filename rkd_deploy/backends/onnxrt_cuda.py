"""ONNX Runtime on CUDA: its libraries, its provider's options, runs captured as CUDA graphs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends.onnx_bytes import has_16_bit_weights
from rkd_deploy.backends.protocol import Array
from rkd_deploy.backends.runtimes import RunOn, require_runtime

OPTIONS: dict[str, str] = {}
"""More options of the CUDA provider, for every session that is opened; benchmarks/gpu.py compares some."""
_LIBRARIES = ("cudart", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "nvrtc", "cudnn")
"""Libraries of CUDA and cuDNN, each after those that it needs."""


@functools.cache
def preload() -> None:
    """Load the CUDA libraries of the nvidia wheels, which the provider finds by name then, without LD_LIBRARY_PATH.

    ONNX Runtime's own `preload_dlls` looks beside its own folder alone, which is not where the wheels are when it was
    installed with --target; and it prints what it misses, to standard output.
    """
    ort = require_runtime("onnxruntime", "gpu")
    if not hasattr(ort, "preload_dlls"):  # older than 1.21
        return
    package = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package is not None else []
    for library in _LIBRARIES:
        for file in [file for folder in folders for file in sorted(folder.glob(f"*/lib/lib{library}.so.*"))]:
            with contextlib.suppress(OSError):  # of another CUDA: the provider's own error says what it lacks
                ctypes.CDLL(str(file))
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def provider_options(file: Path, index: int, run_on: RunOn, *, graph: bool) -> dict[str, str]:
    """Options of the CUDA provider.

    TF32 is the provider's default, and a model that says fp32 must not lose 13 bits of its mantissa. But what use_tf32
    turns off are all tensor cores, those of float16 too (onnxruntime 1.31, core/providers/cuda/nn/conv.cc): cuDNN's
    frontend then finds no plan for a float16 convolution, writes an error, and runs it without its bias and activation.

    Args:
        file: The ONNX file.
        index: Number of the device.
        run_on: For its memory limit.
        graph: Whether runs are captured as CUDA graphs.
    """
    options = {"device_id": str(index), "use_tf32": "1" if has_16_bit_weights(file) else "0"}
    if run_on.memory_limit is not None:  # and no memory taken ahead: by default the arena grows by powers of two
        options |= {"gpu_mem_limit": str(run_on.memory_limit), "arena_extend_strategy": "kSameAsRequested"}
    if graph:
        options["enable_cuda_graph"] = "1"
    return options | OPTIONS


@contextlib.contextmanager
def quiet_terminal() -> Iterator[Callable[[], int]]:
    """Keep cuDNN's error lines from the terminal inside the block; everything else that is written comes after it.

    They are written by C++ to the process's standard error, one for each convolution that it has no plan for, and
    ONNX Runtime then takes another way. No setting of a session turns them off. Nor does one turn off the warning that
    1.31 writes for every session since its CUDA provider can be a plugin too, and here is none; it is no news.

    Yields:
        Gives, after the block, how many of cuDNN's lines there were.
    """
    count = 0
    try:
        terminal = os.dup(2)
    except OSError:  # a process without standard error
        yield lambda: 0
        return
    with tempfile.TemporaryFile() as lines:
        os.dup2(lines.fileno(), 2)
        try:
            yield lambda: count
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            lines.seek(0)
            for line in lines:
                if b"cudnn" in line.lower():
                    count += 1
                elif b"No registered plugin EP device found" not in line:
                    with contextlib.suppress(OSError):
                        os.write(2, line)


class CapturedRuns:
    """Runs of a session as CUDA graphs, one for each input shape, at addresses that stay.

    Reference: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (using CUDA graphs)

    Args:
        session: A session that was opened with `enable_cuda_graph`.
        input_name: Name of its one input.
        output_name: Name of the logits.
        index: Number of the device.
    """

    def __init__(self, session: Any, input_name: str, output_name: str, index: int) -> None:
        self._session, self._input, self._output, self._index = session, input_name, output_name, index
        self._captured = 0
        self.lock = threading.Lock()
        """Held while a graph is captured or launched: a session with graphs runs one call at a time."""

    def capture(self, x: Array) -> CapturedRun:
        """Capture a run of this input, in memory of its own."""
        ort = require_runtime("onnxruntime", "gpu")
        eager = ort.RunOptions()
        eager.add_run_config_entry("gpu_graph_id", "-1")  # this run alone is not captured
        logits: Array = self._session.run([self._output], {self._input: x}, eager)[0]
        self._captured += 1
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._captured))  # 0 is ONNX Runtime's own
        resident_x = ort.OrtValue.ortvalue_from_numpy(np.array(x, order="C"), "cuda", self._index)
        resident_logits = ort.OrtValue.ortvalue_from_shape_and_type(
            list(logits.shape), logits.dtype, "cuda", self._index
        )
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, resident_x)
        binding.bind_ortvalue_output(self._output, resident_logits)
        run = CapturedRun(self._session, binding, options, resident_x, resident_logits)
        run.replay()  # warms up, captures and runs
        return run


class CapturedRun:
    """A captured run of one input shape: it reads and writes the same memory each time."""

    def __init__(self, session: Any, binding: Any, options: Any, x: Any, logits: Any) -> None:
        self._session, self._binding, self._options = session, binding, options
        self._x, self._logits = x, logits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return tuple(self._logits.shape())

    def infer(self, x: Array) -> Array:
        """Logits of another input of the captured shape."""
        self._x.update_inplace(np.ascontiguousarray(x))
        self.replay()
        logits: Array = self._logits.numpy()
        return logits

    def replay(self) -> None:
        """Run on the input that is in the graph's memory, and wait for the end."""
        self._session.run_with_iobinding(self._binding, self._options)

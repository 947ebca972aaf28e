"""ONNX Runtime, on the CPU and on CUDA; on CUDA also by its TensorRT execution provider.

ONNX Runtime lists the CUDA and TensorRT providers even where their libraries are missing, and then runs the session on
the CPU without an error. Here that is one: `onnxrt_session.check_provider`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from rkd_deploy.backends.files import broken_model, model_path, stated_precision
from rkd_deploy.backends.onnxrt_cuda import CapturedRun, CapturedRuns, quiet_terminal
from rkd_deploy.backends.onnxrt_session import (
    PROVIDERS,
    check_provider,
    failed_run,
    only_input,
    open_session,
    profiled_runs,
)
from rkd_deploy.backends.protocol import (
    Array,
    Backend,
    LayerRun,
    ModelInfo,
    check_rows,
    closed_backend,
    logits_first,
    parse_device,
)
from rkd_deploy.backends.runtimes import RunOn, require_runtime
from rkd_deploy.errors import BackendError

SMALL_INPUT_BYTES = 1 << 20
"""Largest input whose copy into bound memory costs less than ONNX Runtime's own binding of a new array."""


class OnnxRuntimeBackend(Backend):
    """An ONNX file in one ONNX Runtime session; threads may share it."""

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], run_on: RunOn | None = None) -> None:
        """Load the file and make sure that it runs on the device asked for.

        Args:
            path: Bundle folder, or an .onnx file.
            run_on: Where. Default: the backend's own device.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            ModelFileError: The file is missing or corrupt.
            BackendError: The device is not to be had here, or the model has no single numeric input.
        """
        file, run_on = model_path(path), run_on or RunOn(self.name)
        kind, self._index = parse_device(run_on.where)
        self._kind, provider, self._threads = kind, self._provider(kind), run_on.threads
        self._shapes: set[tuple[int, ...]] = set()
        self._error_lines = 0
        with self._choosing_kernels(()):
            self._session: Any = self._opened(file, provider, run_on)
        self._binding: Any = None
        self._local = threading.local()
        check_provider(self._session.get_providers(), provider)
        self.device = "cpu" if kind == "cpu" else f"{kind}:{self._index}"
        try:
            metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
            self._input = only_input(file, self._session.get_inputs())
            outputs = logits_first(file, [output.name for output in self._session.get_outputs()])
        except UnicodeDecodeError as error:  # a flipped bit in a name gets past ONNX Runtime
            raise broken_model(file, str(error)) from error
        self._logits = [outputs[0]]
        self.precision = stated_precision(metadata, file)
        self._info = ModelInfo(
            input_name=self._input.name,
            input_shape=self._input.shape,
            input_dtype=self._input.dtype.name,
            outputs=outputs,
            metadata=metadata,
            file=file,
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], run_on: RunOn) -> Self:
        """Load a bundle folder's model.onnx or an .onnx file (see the class)."""
        return cls(path, run_on)

    def _provider(self, kind: str) -> str:
        """Which of `PROVIDERS` runs the model on this kind of device."""
        return kind

    def _opened(self, file: Path, provider: str, run_on: RunOn) -> Any:
        return open_session(file, provider, self._index, run_on)

    @property
    def info(self) -> ModelInfo:
        """What the model takes and gives; the metadata are the custom metadata of the ONNX file."""
        return self._info if self._kind == "cpu" else replace(self._info, error_lines=self._error_lines)

    @contextlib.contextmanager
    def _choosing_kernels(self, shape: tuple[int, ...]) -> Iterator[None]:
        """The first run of a shape on CUDA, in which kernels are chosen, and cuDNN writes of those that it has not."""
        if self._kind == "cpu" or shape in self._shapes:
            yield
            return
        self._shapes.add(shape)
        with quiet_terminal() as lines:
            yield
        self._error_lines += lines()

    def infer(self, x: Array) -> Array:
        """Run one batch, host to host; small inputs on a CPU go through memory that is bound once."""
        # The usual case first and with few calls: a small model answers in the time of some dozen of them.
        bound: _BoundRun | None = getattr(self._local, "bound", None)
        if bound is not None and self._session is not None and bound.fits(x):
            try:
                return bound.run(x)
            except BackendError:
                self._local.bound = None  # what the failed run left in its memory must not be met by the next one
                raise
        session = self._live()
        self._input.check(x)
        try:
            with self._choosing_kernels(x.shape):
                logits: Array = session.run(self._logits, {self._input.name: x})[0]
        except Exception as error:  # ONNX Runtime's own exceptions have no other base
            raise failed_run(error) from error
        check_rows(logits.shape, len(x))
        if self._kind == "cpu" and x.nbytes <= SMALL_INPUT_BYTES and logits.dtype != object:
            self._local.bound = _BoundRun(session, self._input.name, x, self._logits[0], logits)
        return logits

    def infer_all(self, x: Array) -> tuple[Array, ...]:
        """Run one batch, host to host, and give every output."""
        session = self._live()
        self._input.check(x)
        try:
            with self._choosing_kernels(x.shape):
                outputs: tuple[Array, ...] = tuple(session.run(list(self._info.outputs), {self._input.name: x}))
        except Exception as error:  # ONNX Runtime's own exceptions have no other base
            raise failed_run(error) from error
        for output in outputs:
            check_rows(output.shape, len(x))
        return outputs

    def prepare(self, x: Array) -> Callable[[], None]:
        """Bind a copy of `x` on the device; ONNX Runtime waits for each run before the call returns."""
        self._live()
        self._input.check(x)
        ort = require_runtime("onnxruntime", "cpu")
        binding = self._live().io_binding()
        # On a CPU the OrtValue borrows the array's memory: our own copy keeps the caller's later writes out.
        value = ort.OrtValue.ortvalue_from_numpy(np.array(x, order="C"), self._kind, self._index)
        binding.bind_ortvalue_input(self._input.name, value)
        for name in self._info.outputs:
            binding.bind_output(name, self._kind, self._index)
        self._binding = binding
        checked = False

        def run() -> None:
            nonlocal checked
            session = self._live()
            try:
                with self._choosing_kernels(x.shape):
                    session.run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime's own exceptions have no other base
                raise failed_run(error) from error
            if not checked:  # the shape of later runs is that of the first
                check_rows(binding.get_outputs()[0].shape(), len(x))
                checked = True

        return run

    def synchronize(self) -> None:
        """Wait until the outputs of what was prepared last are complete."""
        self._live()
        if self._binding is not None:
            self._binding.synchronize_outputs()

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """Kernel times of each run on a CPU; none on CUDA, where the profile would hold the launches alone."""
        self._live()
        self._input.check(x)
        if self._kind != "cpu" or self._info.file is None:
            return []
        return profiled_runs(self._info.file, self._input.name, x, self._threads, count)

    def close(self) -> None:
        """Give the session and all bound memory back."""
        self._session = self._binding = None
        self._local = threading.local()

    def _live(self) -> Any:
        if self._session is None:
            raise closed_backend(self.name)
        return self._session


class GraphedOnnxRuntimeBackend(OnnxRuntimeBackend):
    """An ONNX file on CUDA, each input shape's run captured as a CUDA graph and launched whole; threads take turns.

    A model of which the CUDA provider could run a part only is refused: a graph holds no work of the CPU.
    """

    name = "onnxruntime:cuda-graphs"

    def __init__(self, path: str | os.PathLike[str], run_on: RunOn | None = None) -> None:
        """Load the file; arguments and errors as for `OnnxRuntimeBackend`."""
        super().__init__(path, run_on or RunOn(self.name))
        self._info = replace(self._info, cuda_graph=True)
        self._runs: CapturedRuns | None = CapturedRuns(self._session, self._input.name, self._logits[0], self._index)
        self._by_shape: dict[tuple[int, ...], CapturedRun] = {}

    def _provider(self, kind: str) -> str:
        if kind == "cpu":
            raise BackendError(
                f"Device 'cpu' was asked for; the {self.name} backend runs on device='cuda' or 'cuda:N' only. On a CPU "
                "run onnxruntime."
            )
        return kind

    def _opened(self, file: Path, provider: str, run_on: RunOn) -> Any:
        return open_session(file, provider, self._index, run_on, graph=True)

    def infer(self, x: Array) -> Array:
        """Launch the graph of this shape, which the first run of the shape captures."""
        self._live()
        self._input.check(x)
        runs = self._runs
        assert runs is not None  # as long as the session lives
        with runs.lock, _explained_runs(), self._choosing_kernels(x.shape):
            run = self._by_shape.get(x.shape)
            if run is None:
                run = self._by_shape[x.shape] = runs.capture(x)
                check_rows(run.shape, len(x))
            return run.infer(x)

    def infer_all(self, x: Array) -> tuple[Array, ...]:
        """Refused where there is more than the logits: what is captured gives them alone."""
        return Backend.infer_all(self, x)

    def prepare(self, x: Array) -> Callable[[], None]:
        """Capture a graph of its own for this input; ONNX Runtime waits for each launch to end."""
        self._live()
        self._input.check(x)
        runs = self._runs
        assert runs is not None
        with runs.lock, _explained_runs(), self._choosing_kernels(x.shape):
            captured = runs.capture(x)
        check_rows(captured.shape, len(x))

        def run() -> None:
            self._live()
            with runs.lock, _explained_runs():
                captured.replay()

        return run

    def close(self) -> None:
        """Let go of the graphs and the session."""
        super().close()
        self._runs = None
        self._by_shape = {}


@contextlib.contextmanager
def _explained_runs() -> Iterator[None]:
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions have no other base
        raise failed_run(error) from error


_TENSORRT = "libnvinfer.so.10"
"""Library that ONNX Runtime's TensorRT provider is linked to; the provider is listed without it too."""


def has_tensorrt() -> bool:
    """Whether the library of the TensorRT execution provider can be loaded."""
    try:
        ctypes.CDLL(_TENSORRT)
    except OSError:
        return False
    return True


class TensorRtProviderBackend(OnnxRuntimeBackend):
    """An ONNX file on CUDA by the TensorRT execution provider, which builds its engine when the model is loaded.

    A model of which it could run a part only is refused: the rest would run on the CPU.
    """

    name = "onnxruntime:tensorrt"

    def _provider(self, kind: str) -> str:
        if kind == "cpu":
            raise BackendError(
                f"Device 'cpu' was asked for; the {self.name} backend runs on device='cuda' or 'cuda:N' only."
            )
        listed = PROVIDERS["tensorrt"] in require_runtime("onnxruntime", "gpu").get_available_providers()
        if listed and not has_tensorrt():
            raise BackendError(
                f"The {self.name} backend needs TensorRT's library {_TENSORRT}, which cannot be loaded here. Install "
                "it (pip install tensorrt-cu12, and its folder in LD_LIBRARY_PATH), or take backend 'tensorrt' or "
                "'onnxruntime' on the same device."
            )
        return "tensorrt"


class _BoundRun:
    """Runs of one input shape through memory that is bound once: no arrays are wrapped or made at every call.

    Each thread has its own, because its memory is written by every run.
    """

    def __init__(self, session: Any, input_name: str, x: Array, output_name: str, logits: Array) -> None:
        ort = require_runtime("onnxruntime", "cpu")
        self._session, self._x, self._logits = session, np.empty_like(x, order="C"), np.empty_like(logits, order="C")
        self._shape, self._dtype = x.shape, x.dtype
        self._binding = session.io_binding()
        # On a CPU an OrtValue borrows the array's memory: what is written to one is in the other.
        self._binding.bind_ortvalue_input(input_name, ort.OrtValue.ortvalue_from_numpy(self._x))
        self._binding.bind_ortvalue_output(output_name, ort.OrtValue.ortvalue_from_numpy(self._logits))

    def fits(self, x: Array) -> bool:
        """Whether this is the shape and type that was bound."""
        return isinstance(x, np.ndarray) and x.shape == self._shape and x.dtype == self._dtype

    def run(self, x: Array) -> Array:
        """Logits of one batch, in an array of their own."""
        self._x[...] = x
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's own exceptions have no other base
            raise failed_run(error) from error
        return self._logits.copy()


def devices() -> tuple[str, ...]:
    """Devices that ONNX Runtime would run on here."""
    if PROVIDERS["cuda"] not in require_runtime("onnxruntime", "cpu").get_available_providers():
        return ("cpu",)
    try:
        ctypes.CDLL("libcuda.so.1")  # the provider is listed on machines without a driver too
    except OSError:
        return ("cpu",)
    return ("cpu", "cuda")

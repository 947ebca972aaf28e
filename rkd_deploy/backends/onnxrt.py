"""ONNX Runtime, on the CPU and on CUDA; on CUDA also by its TensorRT execution provider.

ONNX Runtime lists the CUDA and TensorRT providers even where their libraries are missing, and then runs the session on
the CPU without an error. Here that is one: see `check_provider`.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from rkd_deploy.backends.files import broken_model, model_path, too_new
from rkd_deploy.backends.protocol import (
    Array,
    Backend,
    InputSpec,
    closed_backend,
    logits_first,
    parse_device,
)
from rkd_deploy.backends.runtimes import RunOn
from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.errors import BackendError, install_line, require

CPU_FACTS = Path("/proc/cpuinfo")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
# Raised for what this build or machine cannot run, as opposed to a file that is broken.
_CANNOT_RUN = {
    "cpu": ("NotImplemented", "RuntimeException", "EPFail", "EngineError"),
    "cuda": ("NotImplemented", "RuntimeException", "EPFail", "EngineError", "Fail", "RuntimeError"),
}
_CANNOT_RUN["tensorrt"] = _CANNOT_RUN["cuda"]


SMALL_INPUT_BYTES = 1 << 20
"""Up to here a copy into memory that is bound already costs less than ONNX Runtime's own binding of a new array."""


class OnnxRuntimeBackend(Backend):
    """An ONNX file in one ONNX Runtime session; threads may share it."""

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], run_on: RunOn | None = None) -> None:
        """Load the file and make sure that it runs on the device asked for.

        Args:
            path: Bundle folder, or an .onnx file.
            run_on: Where. Default: the CPU.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            ModelFileError: The file is missing or corrupt.
            BackendError: The device is not to be had here, or the model has no single numeric input.
        """
        file = model_path(path)
        run_on = run_on or RunOn(self.name)
        kind, self._index = parse_device(run_on.where)
        self._kind, provider = kind, self._provider(kind)
        self._session: Any = _open_session(file, provider, self._index, run_on)
        self._binding: Any = None
        self._local = threading.local()
        check_provider(self._session.get_providers(), provider)
        self.device = "cpu" if kind == "cpu" else f"{kind}:{self._index}"
        try:
            self._metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
            self._input = _only_input(file, self._session.get_inputs())
            self.outputs = logits_first(file, [output.name for output in self._session.get_outputs()])
        except UnicodeDecodeError as error:  # a flipped bit in a name gets past ONNX Runtime
            raise broken_model(file, str(error)) from error
        self.input_name, self.input_shape = self._input.name, self._input.shape
        self.input_dtype = self._input.dtype.name
        self._logits = [self.outputs[0]]
        card = self._metadata.get(METADATA_KEY)
        self.precision = ModelCard.from_json(card, str(file)).precision if card else "unknown"

    @classmethod
    def open(cls, path: str | os.PathLike[str], run_on: RunOn) -> Self:
        """Load a bundle folder's model.onnx or an .onnx file (see the class)."""
        return cls(path, run_on)

    def _provider(self, kind: str) -> str:
        """Which of `_PROVIDERS` runs the model on this kind of device."""
        return kind

    def infer(self, x: Array) -> Array:
        """See `Backend.infer`."""
        bound: _BoundRun | None = getattr(self._local, "bound", None)
        if bound is not None and self._session is not None and bound.fits(x):
            return bound.run(x)
        logits: Array = self._run(self._logits, x)[0]
        if self._kind == "cpu" and x.nbytes <= SMALL_INPUT_BYTES and logits.dtype != object:
            self._local.bound = _BoundRun(self._session, self.input_name, x, self._logits[0], logits)
        return logits

    def infer_all(self, x: Array) -> dict[str, Array]:
        """Every output of one run, host to host, by name; arguments and errors as for `infer`."""
        return dict(zip(self.outputs, self._run(list(self.outputs), x), strict=True))

    def _run(self, names: list[str], x: Array) -> list[Array]:
        session = self._session
        if session is None:
            raise closed_backend(self.name)
        self._input.check(x)
        try:
            results: list[Array] = session.run(names, {self.input_name: x})
        except Exception as error:  # ONNX Runtime's own exceptions have no other base
            raise _failed_run(error) from error
        return results

    def prepare(self, x: Array) -> Callable[[], None]:
        """See `Backend.prepare`. ONNX Runtime ends each run with a synchronisation of its own."""
        self._live()
        self._input.check(x)
        ort = require("onnxruntime", "cpu")
        binding = self._live().io_binding()
        # On a CPU the OrtValue borrows the array's memory: our own copy keeps the caller's later writes out.
        value = ort.OrtValue.ortvalue_from_numpy(np.array(x, order="C"), self._kind, self._index)
        binding.bind_ortvalue_input(self.input_name, value)
        for name in self.outputs:
            binding.bind_output(name, self._kind, self._index)
        self._binding = binding

        def run() -> None:
            session = self._live()
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise _failed_run(error) from error

        return run

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self._live()
        if self._binding is not None:
            self._binding.synchronize_outputs()

    def metadata(self) -> Mapping[str, str]:
        """See `Backend.metadata`: the custom metadata of the ONNX file."""
        return self._metadata

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = self._binding = None
        self._local = threading.local()

    def _live(self) -> Any:
        if self._session is None:
            raise closed_backend(self.name)
        return self._session


class TensorRtProviderBackend(OnnxRuntimeBackend):
    """The same on CUDA, by the TensorRT execution provider, which builds its engine when the model is loaded.

    A model of which it could run a part only is refused: the rest would run on the CPU.
    """

    name = "onnxruntime:tensorrt"

    def _provider(self, kind: str) -> str:
        if kind == "cpu":
            raise BackendError(
                f"Device 'cpu' was asked for; the {self.name} backend runs on device='cuda' or 'cuda:N' only."
            )
        return "tensorrt"


class _BoundRun:
    """Runs of one input shape through memory that is bound once: no arrays are wrapped or made at every call.

    Each thread has its own, because its memory is written by every run.
    """

    def __init__(self, session: Any, input_name: str, x: Array, output_name: str, logits: Array) -> None:
        ort = require("onnxruntime", "cpu")
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
            raise _failed_run(error) from error
        return self._logits.copy()


def devices() -> tuple[str, ...]:
    """Devices that ONNX Runtime would run on here."""
    if _PROVIDERS["cuda"] not in require("onnxruntime", "cpu").get_available_providers():
        return ("cpu",)
    try:
        ctypes.CDLL("libcuda.so.1")  # the provider is listed on machines without a driver too
    except OSError:
        return ("cpu",)
    return ("cpu", "cuda")


def check_provider(active: Sequence[str], kind: str) -> None:
    """Refuse a session that fell back to another device.

    Args:
        active: The session's providers, the one in charge first.
        kind: "cpu", "cuda" or "tensorrt", as asked for.

    Raises:
        BackendError: The first provider is not the one asked for.
    """
    wanted = _PROVIDERS[kind]
    if active and active[0] == wanted:
        return
    if kind == "tensorrt":
        raise BackendError(
            f"ONNX Runtime was asked for {wanted} and fell back to {active[0] if active else 'none'}: it finds no "
            "TensorRT 10 (libnvinfer.so.10), which its wheels are linked to; TensorRT 11 does not do. Put those "
            "libraries on LD_LIBRARY_PATH, or run the model on the tensorrt backend, which takes either."
        )
    raise BackendError(
        f"ONNX Runtime was asked for {wanted} and fell back to {active[0] if active else 'none'}: the libraries of "
        f"{kind} are missing or do not fit the driver. Check with nvidia-smi, install them with: {install_line('gpu')} "
        "(and CUDA and cuDNN, if they are missing), or run on device='cpu'."
    )


def multiplies_int8_exactly(facts: Path) -> bool:
    """Whether ONNX Runtime's fast kernels for uint8 times int8 are exact on this CPU, as far as the system says.

    On x86 without VNNI they saturate in 16 bits, silently, and the slower exact ones must be asked for. With VNNI that
    must not be done: ResNet-18 in int8 then ran slower than in float32. Elsewhere than on x86 it makes no difference.
    """
    try:
        words = facts.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return "avx512_vnni" in words or "avx_vnni" in words


def session_options(threads: int | None) -> Any:
    """The SessionOptions of every session here; None leaves the threads to ONNX Runtime."""
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings about one's own model help nobody who embeds it
    if not multiplies_int8_exactly(CPU_FACTS):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _open_session(file: Path, kind: str, index: int, run_on: RunOn) -> Any:
    ort = require("onnxruntime", "cpu")
    if _PROVIDERS[kind] not in ort.get_available_providers():
        raise BackendError(
            f"{_PROVIDERS[kind]} was asked for; the ONNX Runtime installed here ({ort.__version__}) is built without "
            "it. The two builds share one folder, so replace it: "
            f"pip uninstall -y onnxruntime && {install_line('gpu')} or run on device='cpu'."
        )
    options = session_options(run_on.threads)
    # TF32 is on by default in the CUDA provider, and a model that says fp32 must not lose 13 bits of its mantissa.
    cuda = {"device_id": str(index), "use_tf32": "0"}
    if run_on.memory_limit is not None:  # and no memory taken ahead: by default the arena grows by powers of two
        cuda |= {"gpu_mem_limit": str(run_on.memory_limit), "arena_extend_strategy": "kSameAsRequested"}
    provider = (_PROVIDERS[kind], {"cpu": {}, "cuda": cuda, "tensorrt": {"device_id": str(index)}}[kind])
    if kind == "tensorrt":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # With its fallback on, a session that fails to start or to run moves to the CPU and only prints that.
        return ort.InferenceSession(str(file), options, providers=[provider], enable_fallback=False)
    except Exception as error:  # ONNX Runtime's own exceptions have no other base
        if type(error).__name__ in _CANNOT_RUN[kind]:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} on {kind} cannot run {file}: {_reason(error)}. "
                "Export the model for this target, or run it on another backend (rkd-deploy backends lists them)."
            ) from error
        newer = _newer(str(error))
        if newer:
            raise too_new(file, newer[0], "ONNX Runtime", ort.__version__, newer[1]) from error
        raise broken_model(file, _reason(error)) from error


def _newer(text: str) -> tuple[str, str] | None:
    """What a file is written in and what can be read, where an error says that the file is the newer one."""
    found = re.search(r"Opset (\d+) is under development.* is till opset (\d+)", text, re.DOTALL)
    if found:
        return f"opset {found[1]}", f"opset {found[2]}"
    found = re.search(r"IR version: (\d+), max supported IR version: (\d+)", text)
    return (f"ONNX IR version {found[1]}", f"version {found[2]}") if found else None


def _only_input(file: Path, inputs: Sequence[Any]) -> InputSpec:
    described = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs) or "none"
    way_out = "rkd-deploy runs models with one numeric input, batch first: export the classifier alone."
    if len(inputs) != 1:
        raise BackendError(f"{file} has {len(inputs)} inputs ({described}). {way_out}")
    only = inputs[0]
    if only.type not in _DTYPES:
        raise BackendError(f"The input of {file} is {described}, a type that NumPy has no numbers for. {way_out}")
    if not only.shape:  # ONNX Runtime gives [] for an unknown rank and for a scalar alike
        raise BackendError(f"The input of {file} has no known rank ({described}). {way_out}")
    shape = tuple(size if isinstance(size, int) and size > 0 else None for size in only.shape)
    return InputSpec(only.name, shape, np.dtype(_DTYPES[only.type]))


def _failed_run(error: Exception) -> BackendError:
    wanted = re.search(r"Failed to allocate memory for requested buffer of size (\d+)", str(error))
    if wanted:
        return BackendError(
            f"ONNX Runtime ran out of memory: {int(wanted[1]):,} bytes more were asked for. Use a smaller batch, or "
            "fewer streams, or free memory on the device."
        )
    return BackendError(
        f"ONNX Runtime failed to run the model: {_reason(error)}. "
        "Try a smaller batch; if it stays, check the file with: rkd-deploy verify"
    )


def _reason(error: Exception) -> str:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x failed:Protobuf parsing failed." -> the last part
    text = " ".join(str(error).split(" : ", 3)[-1].split())
    return re.sub(r"^Load model from .*? failed:", "", text).rstrip(".")

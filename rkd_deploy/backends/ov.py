"""OpenVINO, on the CPU; it reads the ONNX file as it is."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from rkd_deploy.backends.files import failed_load, model_path, stated_precision, too_new
from rkd_deploy.backends.onnx_bytes import opset
from rkd_deploy.backends.protocol import (
    Array,
    Backend,
    InputSpec,
    LayerRun,
    LayerTime,
    ModelInfo,
    check_rows,
    closed_backend,
    logits_first,
)
from rkd_deploy.backends.runtimes import RunOn, require_runtime
from rkd_deploy.errors import BackendError

_KNOWN_TO_ALL = 21
"""Opset of ONNX 1.16, which every supported OpenVINO knows: up to it nothing needs to be looked up."""


class OpenVinoBackend(Backend):
    """An ONNX file compiled by OpenVINO; threads may share it."""

    name = "openvino"

    def __init__(self, path: str | os.PathLike[str], run_on: RunOn | None = None) -> None:
        """Compile the file for the CPU, in the precision that it is written in.

        Args:
            path: Bundle folder, or an .onnx file.
            run_on: Where. Default: the CPU.

        Raises:
            ModelFileError: The file is missing or corrupt.
            BackendError: Another device than the CPU, or the model has no single numeric input.
        """
        file, run_on = model_path(path), run_on or RunOn(self.name)
        if run_on.where != "cpu":
            raise BackendError(
                f"Device {run_on.where!r} was asked for; the openvino backend runs on device='cpu' only."
            )
        model = _read(file)
        self.device = "cpu"
        self._input = _only_input(file, model.inputs)
        names = [output.get_any_name() for output in model.outputs]
        outputs = logits_first(file, names)
        self._indices = [names.index(name) for name in outputs]
        metadata = _onnx_metadata(model)
        self.precision = stated_precision(metadata, file)
        self._options = compile_options(run_on.threads)
        self._compiled: Any = _compile(file, model, self._options)
        self._info = ModelInfo(
            input_name=self._input.name,
            input_shape=self._input.shape,
            input_dtype=self._input.dtype.name,
            outputs=outputs,
            metadata=metadata,
            file=file,
        )
        self._local = threading.local()

    @classmethod
    def open(cls, path: str | os.PathLike[str], run_on: RunOn) -> Self:
        """Load a bundle folder's model.onnx or an .onnx file (see the class)."""
        return cls(path, run_on)

    @property
    def info(self) -> ModelInfo:
        """What the model takes and gives; the metadata are the custom metadata of the ONNX file."""
        return self._info

    def infer(self, x: Array) -> Array:
        """Run one batch, host to host, in this thread's own request."""
        return self._outputs(x, self._indices[:1])[0]

    def infer_all(self, x: Array) -> tuple[Array, ...]:
        """Run one batch, host to host, and give every output."""
        return self._outputs(x, self._indices)

    def prepare(self, x: Array) -> Callable[[], None]:
        """Copy `x` into a request once; each call of what is returned runs it to its end."""
        self._input.check(x)
        request = self._live().create_infer_request()
        # A copy that the tensor owns: bound once, and nobody else can write or free it.
        request.set_input_tensor(
            require_runtime("openvino", "openvino").Tensor(np.ascontiguousarray(x), shared_memory=False)
        )

        checked = False

        def run() -> None:
            nonlocal checked
            self._live()
            _run(request, None)
            if not checked:
                self._result(request, self._indices[0], len(x))
                checked = True

        return run

    def synchronize(self) -> None:
        """Do nothing but refuse a closed backend: every run has ended when its call returns."""
        self._live()

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """Times of the operators that ran, from the model compiled once more with performance counters."""
        self._live()
        self._input.check(x)
        file, core = self._info.file, require_runtime("openvino", "openvino").Core()
        compiled = core.compile_model(str(file), "CPU", {**self._options, "PERF_COUNT": True})
        request, runs = compiled.create_infer_request(), []
        for _ in range(count):
            _run(request, np.ascontiguousarray(x))
            runs.append(_executed(request.get_profiling_info()))
        return runs

    def close(self) -> None:
        """Give the compiled model and the requests of all threads back."""
        self._compiled = None
        self._local = threading.local()

    def _live(self) -> Any:
        if self._compiled is None:
            raise closed_backend(self.name)
        return self._compiled

    def _outputs(self, x: Array, indices: Sequence[int]) -> tuple[Array, ...]:
        request = self._request()
        self._input.check(x)
        try:
            # Shared in, where the memory allows it; out as a copy, because the request writes its own memory again.
            _run(request, np.ascontiguousarray(x))
            return tuple(self._result(request, index, len(x)).copy() for index in indices)
        except BackendError:
            self._local.request = None  # a request whose run broke off fails at valid inputs, too
            raise

    def _result(self, request: Any, index: int, batch: int) -> Array:
        """An output of a run, in memory that belongs to the request and is overwritten by its next run."""
        result: Array = request.get_output_tensor(index).data
        # OpenVINO 2026.4 raises nothing then, and the time of such a run would be measured as if it were one.
        if result.size == 0:
            raise BackendError(
                f"OpenVINO gave an empty result {list(result.shape)} for a batch of {batch}, as it does where memory "
                "runs out. Use a smaller batch, or fewer streams, or free memory."
            )
        check_rows(result.shape, batch)
        return result

    def _request(self) -> Any:
        """The infer request of this thread: one request runs one batch at a time."""
        compiled = self._live()
        if getattr(self._local, "request", None) is None:
            self._local.request = compiled.create_infer_request()
        return self._local.request


def devices() -> tuple[str, ...]:
    """Devices that this backend would run on here."""
    require_runtime("openvino", "openvino")
    return ("cpu",)


def _read(file: Path) -> Any:
    try:
        model = require_runtime("openvino", "openvino").Core().read_model(str(file))
    except RuntimeError as error:
        if "No conversion rule" in str(error):
            _check_opset(file)
            raise BackendError(
                f"OpenVINO does not know what {file} computes: {_reason(error).lstrip('- ')}. "
                "Run it on another backend (rkd-deploy backends lists them), or export the classifier without it."
            ) from error
        raise failed_load(file, _library(), _reason(error)) from error
    _check_opset(file)
    return model


def _check_opset(file: Path) -> None:
    # OpenVINO takes a newer opset for the newest one it knows, and would compute what the file may not mean.
    written = opset(file)
    newest = None if written <= _KNOWN_TO_ALL else newest_opset()
    if newest is not None and written > newest:
        raise too_new(file, f"opset {written}", "OpenVINO", _library().split()[1], f"opset {newest}")


def _library() -> str:
    return f"OpenVINO {require_runtime('openvino', 'openvino').__version__.split('-')[0]}"


@cache
def newest_opset() -> int | None:
    """The newest ONNX opset that OpenVINO knows; None where that cannot be told.

    There is no function to ask: it is the newest of the operator tables of ONNX that are linked into its reader.
    """
    folder = Path(str(require_runtime("openvino", "openvino").__file__)).parent
    readers = [file for file in folder.rglob("*openvino_onnx_frontend*") if file.is_file()]
    versions = [int(match) for file in readers for match in re.findall(rb"OpSet_Onnx_ver(\d+)", file.read_bytes())]
    return max(versions, default=None)


def _onnx_metadata(model: Any) -> dict[str, str]:
    info = model.get_rt_info()
    return {key: str(value.value) for key, value in info["framework"].items()} if "framework" in info else {}


def compile_options(threads: int | None) -> dict[str, Any]:
    """Properties that every model here is compiled with; None leaves the threads to OpenVINO."""
    # On CPUs with bfloat16 units OpenVINO would compute in that by itself; a file that says fp32 must mean it.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


def _compile(file: Path, model: Any, options: Mapping[str, Any]) -> Any:
    try:
        return require_runtime("openvino", "openvino").Core().compile_model(model, "CPU", dict(options))
    except RuntimeError as error:
        failure = failed_load(file, _library(), _reason(error))
        if isinstance(failure, BackendError):
            raise failure from error
        raise BackendError(
            f"OpenVINO cannot run {file}: {_reason(error)}. Run it on another backend (rkd-deploy backends lists them)."
        ) from error


def _run(request: Any, x: Array | None) -> None:
    """Run a request once; x is None where its input is bound already."""
    try:
        # Shared outputs: else each run copies all of them into arrays that nobody reads.
        request.infer(None if x is None else {0: x}, share_inputs=True, share_outputs=True)
    except RuntimeError as error:
        wanted = re.search(r"Failed to allocate (\d+) bytes", str(error))
        if wanted:
            raise BackendError(
                f"OpenVINO ran out of memory: {int(wanted[1]):,} bytes more were asked for. Use a smaller batch, or "
                "fewer streams, or free memory."
            ) from error
        raise BackendError(
            f"OpenVINO failed to run the model: {_reason(error)}. "
            "Try a smaller batch; if it stays, check the file with: rkd-deploy verify"
        ) from error


def _only_input(file: Path, inputs: list[Any]) -> InputSpec:
    way_out = "rkd-deploy runs models with one numeric input, batch first: export the classifier alone."
    described = ", ".join(f"{item.get_any_name()} {item.partial_shape}" for item in inputs) or "none"
    if len(inputs) != 1:
        raise BackendError(f"{file} has {len(inputs)} inputs ({described}). {way_out}")
    if inputs[0].partial_shape.rank.is_dynamic:
        raise BackendError(f"The input of {file} has no known rank ({described}). {way_out}")
    only = inputs[0]
    try:
        dtype = np.dtype(only.element_type.to_dtype())
    except (RuntimeError, TypeError):
        dtype = np.dtype(np.str_)
    if dtype.kind not in "biuf":
        raise BackendError(
            f"The input of {file} is {described} of type {only.element_type.get_type_name()}, no number. {way_out}"
        )
    shape = tuple(size.get_length() if size.is_static else None for size in only.partial_shape)
    return InputSpec(only.get_any_name(), shape, dtype)


_NUMPY_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i32": "int32"}


def _executed(nodes: Sequence[Any]) -> LayerRun:
    return [_layer_time(node) for node in nodes if node.status.name == "EXECUTED"]


def _layer_time(node: Any) -> LayerTime:
    # OpenVINO's kernels are named after their type: brgconv_avx512_I8, jit_gemm_FP32.
    kind = node.exec_type.rpartition("_")[2].lower().replace("fp", "f")
    return LayerTime(node.node_name, node.node_type, 1000 * node.real_time.total_seconds(), _NUMPY_NAMES.get(kind))


def _reason(error: Exception) -> str:
    # Traces of OpenVINO's own source files come first, the reason last.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")

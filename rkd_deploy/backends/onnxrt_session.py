"""Opens sessions of ONNX Runtime, puts their errors in plain words and reads their profiles."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends import onnxrt_cuda
from rkd_deploy.backends.files import failed_load, too_new
from rkd_deploy.backends.protocol import Array, InputSpec, LayerRun, LayerTime
from rkd_deploy.backends.runtimes import RunOn, require_runtime
from rkd_deploy.errors import BackendError, install_line

CPU_FACTS = Path("/proc/cpuinfo")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Execution provider by kind of device; "tensorrt" is a second provider for CUDA devices."""
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


def open_session(file: Path, kind: str, index: int, run_on: RunOn, *, graph: bool = False) -> Any:
    """An InferenceSession of a file.

    Args:
        file: The ONNX file.
        kind: A key of `PROVIDERS`.
        index: Number of the CUDA device.
        run_on: Threads and memory limit.
        graph: Whether its runs on CUDA are captured as CUDA graphs.

    Raises:
        ModelFileError: The file is corrupt.
        BackendError: This build or machine cannot run it.
    """
    ort = require_runtime("onnxruntime", "cpu")
    if PROVIDERS[kind] not in ort.get_available_providers():
        raise BackendError(
            f"{PROVIDERS[kind]} was asked for; the ONNX Runtime installed here ({ort.__version__}) is built without "
            "it. The two builds share one folder, so replace it: "
            f"pip uninstall -y onnxruntime && {install_line('gpu')} or run on device='cpu'."
        )
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise BackendError(
            f"{str(file)!a} has bytes in its name that are no UTF-8, and ONNX Runtime opens no such file. Rename it."
        ) from error
    options = session_options(run_on.threads)
    if kind != "cpu":
        onnxrt_cuda.preload()
    cuda = onnxrt_cuda.provider_options(file, index, run_on, graph=graph) if kind == "cuda" else {}
    provider = (PROVIDERS[kind], {"cpu": {}, "cuda": cuda, "tensorrt": {"device_id": str(index)}}[kind])
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
        raise failed_load(file, f"ONNX Runtime {ort.__version__}", _reason(error)) from error


def session_options(threads: int | None) -> Any:
    """The SessionOptions of every session here; None leaves the threads to ONNX Runtime."""
    ort = require_runtime("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings about one's own model help nobody who embeds it
    if not multiplies_int8_exactly(CPU_FACTS):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


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


def check_provider(active: Sequence[str], kind: str) -> None:
    """Refuse a session that fell back to another device.

    Args:
        active: The session's providers, the one in charge first.
        kind: Key of `PROVIDERS` that was asked for.

    Raises:
        BackendError: The first provider is not the one asked for.
    """
    wanted = PROVIDERS[kind]
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


def only_input(file: Path, inputs: Sequence[Any]) -> InputSpec:
    """The one numeric input of a session.

    Raises:
        BackendError: There are several or none, or it has no numbers or no known rank.
    """
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


def failed_run(error: Exception) -> BackendError:
    """The error for a run that broke off."""
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


def _newer(text: str) -> tuple[str, str] | None:
    """Version of a file and newest version that can be read, where an error says that the file is newer; else None."""
    match = re.search(r"Opset (\d+) is under development.* is till opset (\d+)", text, re.DOTALL)
    if match:
        return f"opset {match[1]}", f"opset {match[2]}"
    match = re.search(r"IR version: (\d+), max supported IR version: (\d+)", text)
    return (f"ONNX IR version {match[1]}", f"version {match[2]}") if match else None


def _reason(error: Exception) -> str:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x failed:Protobuf parsing failed." -> the last part
    text = " ".join(str(error).split(" : ", 3)[-1].split())
    return re.sub(r"^Load model from .*? failed:", "", text).rstrip(".")


def profiled_runs(file: Path, input_name: str, x: Array, threads: int | None, count: int) -> list[LayerRun]:
    """Runs on the CPU in a session of their own that writes a profile: a session profiles from its start or never.

    Raises:
        BackendError: A run failed.
    """
    ort = require_runtime("onnxruntime", "cpu")
    with tempfile.TemporaryDirectory(prefix="rkd-layers-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(file), options, providers=[PROVIDERS["cpu"]])
        try:
            for _ in range(count):
                session.run(None, {input_name: x})
        except Exception as error:  # ONNX Runtime's own exceptions have no other base
            raise failed_run(error) from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return read_profile(events)


def read_profile(events: Sequence[Mapping[str, Any]]) -> list[LayerRun]:
    """The kernels of each run of an ONNX Runtime profile: events of category Node named NAME_kernel_time, in us."""
    runs: list[LayerRun] = []
    indices: set[str] = set()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        index, op = facts["node_index"], facts.get("op_name", "")
        if not runs or index in indices:  # every run begins with the same node, and has each once
            runs.append([])
            indices = set()
        indices.add(index)
        name = event["name"].removesuffix("_kernel_time") or f"{op} {index}"
        precision = next((kind for types in facts.get("input_type_shape") or () for kind in types), None)
        runs[-1].append(LayerTime(name, op, event["dur"] / 1000, _numpy_name(precision)))
    return runs


def _numpy_name(kind: str | None) -> str | None:
    return {"float": "float32", "double": "float64"}.get(kind, kind) if kind else None

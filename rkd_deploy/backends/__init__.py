"""Backends: one model file, several runtimes, one small protocol (`Backend`).

No backend imports another, and each is imported by name when it is asked for, so that the rest of `serve` needs none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rkd_deploy.backends.files import check_files, model_path, read_card
from rkd_deploy.backends.protocol import Array, Backend, infer_many
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import (
    BackendError,
    MissingDependencyError,
    ModelFileError,
    UsageError,
    install_line,
    require,
    unknown_name,
)

__all__ = [
    "Array",
    "Backend",
    "BackendStatus",
    "available",
    "check_backend",
    "check_options",
    "default_device",
    "infer_many",
    "load_backend",
    "model_path",
]


@dataclass(frozen=True)
class _Runtime:
    package: str
    """Import name of the library."""
    extra: str
    """Extra of this package that brings it."""
    driver: str
    """Class of ours that drives it, as "module:class"."""
    device: str = "cpu"
    """Where it runs unless told otherwise."""
    limited: bool = False
    """Whether its memory on a GPU can be limited."""
    engine: bool = False
    """Whether it runs engines, built where there is none, and can do so with and without CUDA graphs."""


_HERE = __name__
_TENSORRT = f"{__name__}.tensorrt"
_RUNTIMES = {
    "onnxruntime": _Runtime("onnxruntime", "cpu", f"{_HERE}.onnxrt:OnnxRuntimeBackend", limited=True),
    "onnxruntime:tensorrt": _Runtime("onnxruntime", "gpu", f"{_HERE}.onnxrt:TensorRtProviderBackend", "cuda"),
    "pytorch": _Runtime("torch", "export", f"{_HERE}.pytorch:PyTorchBackend", limited=True),
    "pytorch:compile": _Runtime("torch", "export", f"{_HERE}.pytorch:CompiledPyTorchBackend", limited=True),
    "pytorch:cuda-graphs": _Runtime("torch", "export", f"{_HERE}.pytorch:GraphedPyTorchBackend", "cuda", True),
    "openvino": _Runtime("openvino", "openvino", f"{_HERE}.ov:OpenVinoBackend"),
    "tensorrt": _Runtime("tensorrt", "tensorrt", f"{_HERE}.tensorrt:TensorRtBackend", "cuda", engine=True),
    "tensorrt-rtx": _Runtime(
        "tensorrt_rtx", "tensorrt-rtx", f"{_HERE}.tensorrt:TensorRtRtxBackend", "cuda", engine=True
    ),
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether one backend works on this machine, and what to do where it does not."""

    name: str
    ok: bool
    version: str | None
    """Of the library behind it; None where it is not installed."""
    devices: tuple[str, ...]
    """Devices that it would run on here."""
    reason: str | None
    """Why it does not work; None where it does."""
    install: str
    """The exact command that brings the library."""

    @property
    def ways(self) -> tuple[str, ...]:
        """Names of the other ways to run it on the devices here, for `load_backend`: pytorch:compile, say."""
        own = {name: runtime for name, runtime in _RUNTIMES.items() if name.startswith(f"{self.name}:")}
        return tuple(name for name, runtime in own.items() if runtime.device in self.devices)


def load_backend(
    name: str,
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    cuda_graph: bool = True,
    batches: Sequence[int] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Backend:
    """Load a model to run it.

    Args:
        name: One of onnxruntime, pytorch, openvino, tensorrt, tensorrt-rtx; or one of them run another way:
            pytorch:compile, pytorch:cuda-graphs, onnxruntime:tensorrt (its TensorRT execution provider).
        path: Bundle folder, an .onnx file, or, for the two TensorRTs, an engine.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own, a GPU for the two TensorRTs, else the CPU.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        memory_limit: Most bytes of device memory that the runtime may take for itself, on CUDA by ONNX Runtime and
            PyTorch (there of the whole process). A run that needs more fails.
        cuda_graph: False runs engines without capturing them as CUDA graphs.
        batches: Batch sizes that it will be run at: an engine that has to be built is built for these, by default for
            1 to 32, and one that is there has to take them. Of no meaning to backends that take any batch.
        progress: Told how far the build of an engine is: its phase, and a share from 0 to 1.

    Raises:
        UsageError: Unknown backend or device, a memory limit or `cuda_graph` where it has no effect, or an engine that
            does not take the batches.
        MissingDependencyError: The backend's library is not installed.
        BackendError: The backend cannot run here, or not on the device asked for.
        ModelFileError: The model file is missing or corrupt.
    """
    module, _, driver = check_backend(name).partition(":")
    check_options(name, device, memory_limit=memory_limit, cuda_graph=cuda_graph)
    options: dict[str, Any] = {"device": device or _RUNTIMES[name].device, "threads": threads}
    if memory_limit is not None:
        options["memory_limit"] = memory_limit
    if _RUNTIMES[name].engine:
        options |= {"cuda_graph": cuda_graph, "batches": batches, "progress": progress}
    return cast(Backend, getattr(importlib.import_module(module), driver).open(path, **options))


def check_options(name: str, device: str | None, *, memory_limit: int | None, cuda_graph: bool) -> None:
    """Refuse options that would have no effect on a backend, before anything is loaded; arguments as `load_backend`'s.

    Raises:
        UsageError: One has none.
    """
    runtime, device = _RUNTIMES[name], device or _RUNTIMES[name].device
    if memory_limit is not None and memory_limit < 1:
        raise UsageError(f"memory_limit is {memory_limit}; it is in bytes and must be at least 1, or left out.")
    if memory_limit is not None and (device == "cpu" or not runtime.limited):
        limited = ", ".join(other for other, one in _RUNTIMES.items() if one.limited)
        raise UsageError(
            f"memory_limit {memory_limit} has no effect on {name} on {device}; on device='cuda' it holds for {limited}."
            " Leave it out."
        )
    if not cuda_graph and not runtime.engine:
        engines = " and ".join(other for other, one in _RUNTIMES.items() if one.engine)
        instead = ": pytorch is the same without them" if name == "pytorch:cuda-graphs" else ""
        raise UsageError(
            f"cuda_graph=False (--no-cuda-graph) has no effect on {name}{instead}; it is for {engines}, which capture "
            "their runs. Leave it out."
        )


def check_backend(name: str) -> str:
    """Refuse a backend that cannot run here, before anything else is looked at.

    Args:
        name: As for `load_backend`.

    Returns:
        The class of ours that drives it, as "module:class".

    Raises:
        UsageError: Unknown backend.
        MissingDependencyError: Its library is not installed.
    """
    if name not in _RUNTIMES:
        raise UsageError(unknown_name("backend", name, _RUNTIMES))
    runtime = _RUNTIMES[name]
    require(runtime.package, runtime.extra)
    return runtime.driver


def default_device(name: str) -> str:
    """Where a backend runs unless told otherwise: "cpu", or "cuda" where it runs on nothing else.

    Raises:
        UsageError: Unknown backend.
    """
    if name not in _RUNTIMES:
        raise UsageError(unknown_name("backend", name, _RUNTIMES))
    return _RUNTIMES[name].device


def available() -> list[BackendStatus]:
    """Status of every backend, other ways to run one left out.

    Imports the runtimes that are installed, so the first call can take seconds.
    """
    return [_status(name) for name in _RUNTIMES if ":" not in name]


def _status(name: str) -> BackendStatus:
    runtime = _RUNTIMES[name]
    install = install_line(runtime.extra)
    try:
        library = require(runtime.package, runtime.extra)
        devices = importlib.import_module(runtime.driver.partition(":")[0]).devices()
    except MissingDependencyError as error:
        return BackendStatus(name, False, None, (), str(error), install)
    except BackendError as error:
        reason = f"{runtime.package} is installed, and finds no GPU to run on: {error}"
        return BackendStatus(name, False, str(library.__version__), (), reason, install)
    except (ImportError, OSError) as error:
        # Installed and broken, a CUDA library missing say: a status has to report that, not to die of it.
        reason = f"{runtime.package} is installed but cannot be imported ({error}). Install it again with: {install}"
        return BackendStatus(name, False, _version(runtime.package), (), reason, install)
    return BackendStatus(name, True, str(library.__version__), devices, None, install)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_model(path: Path) -> ModelCard:
    """The card of a bundle or an ONNX file.

    Raises:
        ModelFileError: The model is missing or corrupt, or has no card; a file of the bundle is not as it was written.
        MissingDependencyError: Only the ONNX file is there, and no onnxruntime to read it.
    """
    file = model_path(path)
    check_files(path, complete=True)
    metadata = {}
    if not file.with_suffix(".json").exists():
        with load_backend("onnxruntime", file) as backend:
            metadata = dict(backend.metadata())
    card = read_card(file, metadata)
    if card is None:
        raise ModelFileError(f"{file} has no model card: it was not written by rkd-deploy export.")
    return card

"""The backends by name, their libraries, and `RunOn`: which of them runs a model, and where."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, cast

from rkd_deploy.backends.files import ENGINE_SUFFIXES, model_path, program_path
from rkd_deploy.backends.protocol import Backend, parse_device
from rkd_deploy.errors import (
    BackendError,
    MissingDependencyError,
    UsageError,
    install_line,
    installed_version,
    require,
    unknown_name,
)
from rkd_deploy.fields import MOST_THREADS, check_number

# No runtime may call home, nor write an identifier into the home folder. ONNX Runtime reads this variable when it is
# imported. OpenVINO has none: it sends an event as soon as it is imported, through the package openvino_telemetry, and
# takes a stub of its own where that cannot be imported. A program that imports a runtime before this package decides
# for itself.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
_OPENVINO_TELEMETRY = "openvino_telemetry"


def require_runtime(package: str, extra: str) -> ModuleType:
    """Import a runtime's library with its telemetry off; arguments and errors as for `errors.require`."""
    if package in sys.modules:
        return require(package, extra)
    with _without_telemetry():
        return require(package, extra)


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if _OPENVINO_TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # Python's own way to say: cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(_OPENVINO_TELEMETRY, None)


MOST_MEMORY = 1 << 50
"""More bytes than any GPU has: a larger limit is a slip."""


@dataclass(frozen=True)
class _Runtime:
    package: str
    """Import name of the library."""
    extra: str
    """Extra of this package that brings the library."""
    driver: str
    """Class of this package that drives the library, as "module:class"."""
    device: str = "cpu"
    """Where a model runs unless `RunOn.device` says otherwise."""
    limited: bool = False
    """Whether the runtime's memory on a GPU can be limited."""
    engine: bool = False
    """Whether it runs engines, which are built where there is none and can run with and without CUDA graphs."""


_HERE = "rkd_deploy.backends"
_RUNTIMES = {
    "onnxruntime": _Runtime("onnxruntime", "cpu", f"{_HERE}.onnxrt:OnnxRuntimeBackend", limited=True),
    "onnxruntime:cuda-graphs": _Runtime(
        "onnxruntime", "gpu", f"{_HERE}.onnxrt:GraphedOnnxRuntimeBackend", "cuda", limited=True
    ),
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
ENGINE_BACKENDS = tuple(name for name, runtime in _RUNTIMES.items() if runtime.engine)
"""Backends that run engines."""


@dataclass(frozen=True)
class RunOn:
    """Where and how a model runs; made once, by whoever decides it, and passed whole.

    Attributes:
        backend: One of onnxruntime, pytorch, openvino, tensorrt, tensorrt-rtx; or one of them run another way:
            pytorch:compile, pytorch:cuda-graphs, onnxruntime:cuda-graphs, onnxruntime:tensorrt (its TensorRT execution
            provider).
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own, a GPU for the two TensorRTs, else the CPU.
        threads: Threads inside one operator on a CPU; None leaves the number to the runtime.
        memory_limit: Most bytes of device memory that the runtime may take for itself, on CUDA by ONNX Runtime and
            PyTorch (there of the whole process); a run that needs more fails. None: no limit.
        cuda_graph: False runs engines without capturing them as CUDA graphs.
        streams: Callers at once, each with the model loaded for itself; only a bench has more than one.

    Raises:
        UsageError: Unknown backend or device, a number out of range, or an option that has no effect on this backend.
    """

    backend: str = "onnxruntime"
    _: KW_ONLY
    device: str | None = None
    threads: int | None = None
    memory_limit: int | None = None
    cuda_graph: bool = True
    streams: int = 1

    def __post_init__(self) -> None:
        runtime = _runtime(self.backend)
        if self.device is not None:
            parse_device(self.device)
        check_number("streams", self.streams, 1, MOST_THREADS, whole=True)
        if self.threads is not None:
            check_number("threads", self.threads, 1, MOST_THREADS, whole=True)
        if self.memory_limit is not None:
            check_number("memory_limit", self.memory_limit, 1, MOST_MEMORY, whole=True)
        if self.memory_limit is not None and (self.where == "cpu" or not runtime.limited):
            limited = ", ".join(name for name, other in _RUNTIMES.items() if other.limited)
            raise UsageError(
                f"memory_limit {self.memory_limit} has no effect on {self.backend} on {self.where}; on device='cuda' "
                f"it holds for {limited}. Leave it out."
            )
        if not self.cuda_graph and not runtime.engine:
            plain, _, way = self.backend.partition(":")
            instead = f": {plain} is the same without them" if way == "cuda-graphs" else ""
            raise UsageError(
                f"cuda_graph=False (--no-cuda-graph) has no effect on {self.backend}{instead}; it is for "
                f"{' and '.join(ENGINE_BACKENDS)}, which capture their runs. Leave it out."
            )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", threads {self.threads}"
        return f"{self.backend}{threads}" + ("" if self.streams == 1 else f", streams {self.streams}")

    @property
    def where(self) -> str:
        """The device asked for, or the backend's own: "cpu", "cuda" or "cuda:N"."""
        return self.device or _RUNTIMES[self.backend].device

    @property
    def runs_engines(self) -> bool:
        """Whether the backend runs engines, which are built where there is none."""
        return _RUNTIMES[self.backend].engine

    def check_file(self, path: str | os.PathLike[str]) -> None:
        """Refuse a model of which this backend has no file to run; nothing is loaded for it.

        Raises:
            UsageError: The model is an engine, and the backend runs none.
            BackendError: PyTorch, of a model without an exported program.
            ModelFileError: The file is missing, empty or cannot be read.
        """
        if self.backend.startswith("pytorch"):
            program_path(path)
            return
        file = model_path(path)
        if file.suffix in ENGINE_SUFFIXES and not self.runs_engines:
            raise UsageError(
                f"{file} is an engine, which only {' or '.join(ENGINE_BACKENDS)} can run; {self.backend} was asked "
                "for. Name the ONNX file it was built from, or leave that backend out."
            )

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        batches: Sequence[int] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Backend:
        """Load a model once, whatever the number of streams.

        Args:
            path: Bundle folder, an .onnx file, or, for the two TensorRTs, an engine.
            batches: Batch sizes that the model will be run at: an engine that has to be built is built for these, by
                default for 1 to 32, and one that is there has to take them. Of no meaning to other backends.
            progress: Called with the phase of an engine's build and the share of it that is done, 0 to 1.

        Raises:
            UsageError: The engine does not take the batches, or is one, and the backend runs none.
            MissingDependencyError: The backend's library is not installed.
            BackendError: The backend cannot run here, or not on the device asked for.
            ModelFileError: The model file is missing or corrupt.
        """
        module, _, driver = check_backend(self.backend).partition(":")
        self.check_file(path)
        build: dict[str, Any] = {"batches": batches, "progress": progress} if self.runs_engines else {}
        return cast(Backend, getattr(importlib.import_module(module), driver).open(path, self, **build))


def check_backend(name: str) -> str:
    """Refuse a backend that cannot run here, before anything else is looked at.

    Args:
        name: As for `RunOn.backend`.

    Returns:
        The class of this package that drives the backend, as "module:class".

    Raises:
        UsageError: Unknown backend.
        MissingDependencyError: The backend's library is not installed.
    """
    runtime = _runtime(name)
    require_runtime(runtime.package, runtime.extra)
    return runtime.driver


def default_device(name: str) -> str:
    """Where a backend runs unless `RunOn.device` says otherwise: "cpu", or "cuda" where it runs on nothing else.

    Raises:
        UsageError: Unknown backend.
    """
    return _runtime(name).device


def _runtime(name: str) -> _Runtime:
    if not isinstance(name, str) or name not in _RUNTIMES:
        raise UsageError(unknown_name("backend", name, _RUNTIMES))
    return _RUNTIMES[name]


@dataclass(frozen=True)
class BackendStatus:
    """Whether one backend works on this machine, and what to do where it does not."""

    name: str
    ok: bool
    version: str | None
    """Version of the library behind the backend; None where it is not installed."""
    devices: tuple[str, ...]
    """Kinds of device that the backend would run on here: "cpu", "cuda"."""
    reason: str | None
    """Why the backend does not work; None where it does."""
    install: str
    """The exact command that brings the library."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Other names in `RunOn` that run this backend another way on the devices here: pytorch:compile, say."""
        modes = {name: runtime for name, runtime in _RUNTIMES.items() if name.startswith(f"{self.name}:")}
        return tuple(name for name, runtime in modes.items() if runtime.device in self.devices)


def available() -> list[BackendStatus]:
    """Status of every backend; other ways to run one, such as pytorch:compile, are left out.

    Imports the runtimes that are installed, so the first call can take seconds.
    """
    return [_status(name) for name in _RUNTIMES if ":" not in name]


def _status(name: str) -> BackendStatus:
    runtime = _RUNTIMES[name]
    install = install_line(runtime.extra)
    try:
        library = require_runtime(runtime.package, runtime.extra)
        devices = importlib.import_module(runtime.driver.partition(":")[0]).devices()
    except MissingDependencyError as error:
        return BackendStatus(name, False, None, (), str(error), install)
    except BackendError as error:
        reason = f"{runtime.package} is installed, and finds no GPU to run on: {error}"
        return BackendStatus(name, False, str(library.__version__), (), reason, install)
    except (ImportError, OSError) as error:
        # Installed and broken, a CUDA library missing say: a status has to report that, not to die of it.
        reason = f"{runtime.package} is installed but cannot be imported ({error}). Install it again with: {install}"
        return BackendStatus(name, False, installed_version(runtime.package), (), reason, install)
    return BackendStatus(name, True, str(library.__version__), devices, None, install)

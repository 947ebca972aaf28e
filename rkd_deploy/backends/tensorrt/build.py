"""Builds an engine of an ONNX file, by TensorRT or TensorRT-RTX.

Networks are strongly typed: every tensor keeps the type that the ONNX file gives it, so that precision is made and
measured there, once, for every runtime. TensorRT 11 and TensorRT-RTX know no other way; TensorRT 10 has a flag for it.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rkd_deploy.backends.protocol import Progress
from rkd_deploy.backends.tensorrt.cuda import Gpu, find_gpu
from rkd_deploy.backends.tensorrt.layers import engine_layers, network_layers
from rkd_deploy.backends.tensorrt.record import EngineRecord
from rkd_deploy.backends.tensorrt.settings import HARDWARE, EngineSettings, Library, capabilities, load_library
from rkd_deploy.backends.tensorrt.source import OnnxSource, read_source
from rkd_deploy.errors import BackendError, ModelFileError, UsageError
from rkd_deploy.signals import handling
from rkd_deploy.storage import write_bytes


def monitor(trt: Any, progress: Progress | None) -> Any:
    """An IProgressMonitor that reports the outermost phase and its steps; None where nobody wants it.

    TensorRT nests phases and calls from several threads; the outermost one is the build.
    """
    if progress is None:
        return None
    report = progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def stop(self, number: int, frame: FrameType | None) -> None:
            """A signal handler: the build ends with its next step."""
            self.interrupted = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = max(num_steps, 1)
                self._report(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._report(phase_name, min(1.0, (step + 1) / self._steps[phase_name]))
            return not self.interrupted  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            if self._steps.pop(phase_name, None) is not None:
                self._report(phase_name, 1.0)

        def _report(self, phase_name: str, share: float) -> None:
            try:
                report(phase_name, share)
            except KeyboardInterrupt:  # must not travel through the library, which knows no exceptions of Python's
                self.interrupted = True

    return Monitor()


@dataclass(frozen=True)
class BuiltEngine:
    """An engine fresh from the builder."""

    plan: bytes
    """The engine's bytes as the library deserialises them."""
    record: EngineRecord


def build_engine(
    path: str | os.PathLike[str],
    name: str = "tensorrt",
    settings: EngineSettings | None = None,
    *,
    device: int = 0,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine from a bundle or an ONNX file.

    TensorRT builds for the GPU it runs on; TensorRT-RTX needs none. Two builds by TensorRT-RTX of one file agree to the
    byte where every profile is one batch size; for a range of sizes it orders its shape constants by chance, and the
    two agree in size and layers. TensorRT times kernels, and may choose otherwise the next time.

    Args:
        path: Bundle folder or ONNX file, in any precision.
        name: tensorrt or tensorrt-rtx.
        settings: Batch sizes, devices, compatibility.
        device: Index of the GPU to build on.
        progress: Called with the phase of the build, and how far it is.

    Raises:
        MissingDependencyError: The library, onnx or cuda-bindings is not installed.
        ModelFileError: The model is missing or corrupt, or its card is of a newer schema.
        UsageError: A setting that this library does not have, or that does not fit the model.
        BackendError: An operator that the library does not know, no GPU where one is needed, or a failed build.
    """
    settings = settings or EngineSettings()
    library = load_library(name)
    settings.check(library)
    source = read_source(path)
    gpu = gpu_to_build_on(library, device)
    library.messages.clear()
    started = time.perf_counter()
    # A second build by the same builder gives other bytes: each gets its own.
    builder = library.trt.Builder(library.log)
    if builder is None:
        raise BackendError(f"{library.name} could not start its builder: {library.drain()}.")
    network, parser = _parse(library, builder, source)
    profiles = settings.profiles if _dynamic_batch(network, source) else ()
    config = _configure(library, builder, network, settings, profiles)
    cache = _TimingCache.attach(library, config, settings)
    plan = _watched_build(library, builder, network, config, source.file, progress)
    cache.save(config)
    seconds = time.perf_counter() - started
    layers, layers_of = _layers(library, network, plan, gpu)
    del parser  # it owns the weights of the network until here
    return BuiltEngine(
        plan,
        EngineRecord(
            library=library.name,
            version=library.version,
            device=None if gpu is None else gpu.name,
            compute_capability=None if gpu is None else gpu.capability,
            compute_capabilities=settings.compute_capabilities or (),
            driver=None if gpu is None else gpu.driver,
            profiles=tuple(str(profile) for profile in profiles),
            precision=source.precision,
            settings=settings.to_dict(),
            onnx_name=source.file.name,
            onnx_sha256=source.sha256,
            engine_sha256=hashlib.sha256(plan).hexdigest(),
            engine_bytes=len(plan),
            build_seconds=round(seconds, 6),
            layers=layers,
            layers_of=layers_of,
            metadata=source.metadata,
        ),
    )


def _watched_build(
    library: Library, builder: Any, network: Any, config: Any, file: Path, progress: Progress | None
) -> bytes:
    """The engine's bytes; the build tells how far it is, and ends at Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        BackendError: The build failed.
    """
    watch = monitor(library.trt, progress)
    if watch is not None:
        config.progress_monitor = watch
    # Ctrl-C between two lines of the monitor would be raised into the library: the monitor ends the build instead.
    with nullcontext() if watch is None else handling(watch.stop):
        built = builder.build_serialized_network(network, config)
    if watch is not None and watch.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise BackendError(f"{library.name} {library.version} could not build {file}: {library.drain()}.")
    return bytes(built)


def create_network(library: Library, builder: Any) -> Any:
    """An empty network that takes its types from the ONNX file."""
    if library.is_rtx or library.major >= 11:
        return builder.create_network(0)  # there is no other kind
    return builder.create_network(1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def gpu_to_build_on(library: Library, device: int = 0) -> Gpu | None:
    """The GPU that a build would use; TensorRT-RTX does without one.

    Raises:
        BackendError: One is needed, and is not there.
    """
    return find_gpu(device, needed=not library.is_rtx)


def _parse(library: Library, builder: Any, source: OnnxSource) -> tuple[Any, Any]:
    network = create_network(library, builder)
    parser = library.trt.OnnxParser(network, library.log)
    if not parser.parse(source.content):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        first = _parser_error(errors[0]) if errors else library.drain()
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        library.drain()
        raise BackendError(
            f"{library.name} {library.version} cannot take {source.file}: {first}{more}. Export the model again for "
            "this target (its precision may be another target's), or run it on ONNX Runtime."
        )
    return network, parser


def _parser_error(error: Any) -> str:
    node = error.node_name() or f"number {error.node()}"
    return f"{' '.join(error.desc().split()).rstrip('.')} at node {node} ({error.node_operator() or 'no operator'})"


def _dynamic_batch(network: Any, source: OnnxSource) -> bool:
    """Whether the batch is free; every other dimension has to be fixed."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[tensor.name] = tuple(tensor.shape)
    ((name, shape),) = shapes.items()
    if -1 in shape[1:]:
        raise BackendError(
            f"The input {name} {list(shape)} of {source.file} leaves more open than its batch (-1). Export it with a "
            "fixed image size: an engine is built for known shapes."
        )
    return bool(shape[0] == -1)


def _configure(
    library: Library, builder: Any, network: Any, settings: EngineSettings, profiles: tuple[Any, ...]
) -> Any:
    trt = library.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector knows names only
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[settings.hardware])
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.compute_capabilities is not None:
        known = capabilities(trt)
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, capability in enumerate(settings.compute_capabilities):
            config.set_compute_capability(known[capability], index)
    for wanted in profiles:
        profile = builder.create_optimization_profile()
        tensor = network.get_input(0)
        tail = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((batch, *tail) for batch in (wanted.least, wanted.best, wanted.most)))
        if config.add_optimization_profile(profile) < 0:
            raise UsageError(f"{library.name} refuses the profile {wanted}: {library.drain()}.")
    return config


def _layers(library: Library, network: Any, plan: bytes, gpu: Gpu | None) -> tuple[list[dict[str, Any]], str]:
    if gpu is not None:
        engine = library.trt.Runtime(library.log).deserialize_cuda_engine(plan)
        if engine is not None:
            return engine_layers(engine, library.trt), "engine"
    library.messages.clear()
    return network_layers(network), "network"


class _TimingCache:
    """TensorRT's kernel timings in a file between builds; of no effect where no file is named."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    @classmethod
    def attach(cls, library: Library, config: Any, settings: EngineSettings) -> _TimingCache:
        if settings.timing_cache is None:
            return cls(None)
        file = Path(settings.timing_cache)
        try:
            content = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise ModelFileError(f"The timing cache {file} cannot be read: {error.strerror}. Name another.") from error
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            raise ModelFileError(
                f"The timing cache {file} cannot be used here: {library.drain()}. It belongs to the GPU and version "
                "that wrote it: name another file, or remove this one."
            )
        return cls(file)

    def save(self, config: Any) -> None:
        if self._file is not None:
            write_bytes(self._file, bytes(config.get_timing_cache().serialize()))

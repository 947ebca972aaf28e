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

from rkd_deploy.backends.files import broken_model, check_files, model_path, too_new
from rkd_deploy.backends.protocol import Progress
from rkd_deploy.backends.tensorrt.cuda import Gpu, find_gpu
from rkd_deploy.backends.tensorrt.layers import engine_layers, network_layers
from rkd_deploy.backends.tensorrt.record import EngineRecord
from rkd_deploy.backends.tensorrt.settings import HARDWARE, EngineSettings, Library, capabilities, load_library
from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.errors import BackendError, ModelFileError, UsageError, require
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
class OnnxSource:
    """An ONNX model in memory, its weights inside."""

    file: Path
    content: bytes
    """The bytes that the parser reads. TensorRT gets no path: it can open no other file."""
    sha256: str
    """SHA-256 of `content`: the file's own where its weights are inside it."""
    metadata: dict[str, str]
    card: ModelCard | None
    fixed_batch: bool
    """Whether the file itself fixes the batch, so that an engine has no choice of profiles."""

    @property
    def precision(self) -> str:
        """Precision that the card names; the builder gets none, because it takes every type from the file."""
        return "unknown" if self.card is None else self.card.precision


def read_source(path: str | os.PathLike[str]) -> OnnxSource:
    """Read an ONNX file, and the files that it keeps weights in, which must lie in its own folder.

    Args:
        path: Bundle folder or ONNX file.

    Raises:
        ModelFileError: Missing, corrupt, weights outside of the folder, a card in a newer schema, or a file of the
            bundle that is not as it was written.
        MissingDependencyError: onnx is not installed.
        BackendError: The file is in a newer opset or format than onnx knows, or has not one numeric input.
    """
    file = model_path(path)
    check_files(path, complete=False)
    onnx = require("onnx", "export")
    content = file.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions have no other base
        raise broken_model(file, " ".join(str(error).split())) from error
    _check_versions(file, onnx, model)
    _check_input(file, onnx, model.graph)
    inside = model.ByteSize()
    try:
        onnx.load_external_data_for_model(model, str(file.parent))  # refuses paths and links that leave the folder
    except Exception as error:  # onnx's own, the file system's, and those of broken numbers
        raise ModelFileError(
            f"The weights that {file} keeps in other files cannot be read: {' '.join(str(error).split()).rstrip('.')}. "
            "They must lie in the same folder: copy them there, or save the model with its weights inside."
        ) from error
    if model.ByteSize() != inside:
        content = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise broken_model(file, " ".join(str(error).split())) from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    text = metadata.get(METADATA_KEY)
    card = None if text is None else ModelCard.from_json(text, str(file))
    return OnnxSource(file, content, hashlib.sha256(content).hexdigest(), metadata, card, _fixed_batch(model.graph))


def _fixed_batch(graph: Any) -> bool:
    return all(value.type.tensor_type.shape.dim[0].dim_value > 0 for value in _inputs(graph))


def _inputs(graph: Any) -> list[Any]:
    constants = {constant.name for constant in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _check_input(file: Path, onnx: Any, graph: Any) -> None:
    """Refuse all but one numeric input of known rank: the parsers' own errors, if any, are no help to a user."""
    inputs = _inputs(graph)
    kinds = [onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in inputs]
    described = ", ".join(f"{value.name} {kind.lower()}" for value, kind in zip(inputs, kinds, strict=True)) or "none"
    way_out = "Engines and servers get models with one numeric input, batch first: export the classifier alone."
    if len(inputs) != 1:
        raise BackendError(f"{file} has {len(inputs)} inputs ({described}). {way_out}")
    if kinds[0] in ("STRING", "UNDEFINED"):
        raise BackendError(f"The input of {file} is {described}, no number. {way_out}")
    if not inputs[0].type.tensor_type.shape.dim:
        raise BackendError(f"The input of {file} has no known rank ({described}). {way_out}")


def _check_versions(file: Path, onnx: Any, model: Any) -> None:
    if model.ir_version > onnx.IR_VERSION:
        version, newest = f"ONNX IR version {model.ir_version}", f"version {onnx.IR_VERSION}"
        raise too_new(file, version, "onnx", onnx.__version__, newest)
    # The parsers take a newer opset for the newest one they know, and would build what the file may not mean.
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=newest)
    if opset > newest:
        raise too_new(file, f"opset {opset}", "onnx", onnx.__version__, f"opset {newest}")


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
    watch = monitor(library.trt, progress)
    if watch is not None:
        config.progress_monitor = watch
    cache = _TimingCache.attach(library, config, settings)
    # Ctrl-C between two lines of the monitor would be raised into the library: the monitor ends the build instead.
    with nullcontext() if watch is None else handling(watch.stop):
        built = builder.build_serialized_network(network, config)
    if watch is not None and watch.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise BackendError(f"{library.name} {library.version} could not build {source.file}: {library.drain()}.")
    cache.save(config)
    plan = bytes(built)
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

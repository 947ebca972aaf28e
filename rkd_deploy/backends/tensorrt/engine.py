"""A loaded engine, and runs of it: one execution context with the memory of one input shape."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends.files import failed_load
from rkd_deploy.backends.protocol import Array, InputSpec, check_rows, logits_first
from rkd_deploy.backends.tensorrt.cuda import Buffer, Gpu, Graph, Stream
from rkd_deploy.backends.tensorrt.layers import engine_layers, layer_profiler
from rkd_deploy.backends.tensorrt.record import EngineRecord
from rkd_deploy.backends.tensorrt.settings import Library, Profile, profile_for
from rkd_deploy.errors import BackendError, UsageError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass
class LoadedEngine:
    """A deserialised engine and what it takes and gives."""

    library: Library
    input: InputSpec
    outputs: dict[str, np.dtype[Any]]
    """Name and type of each output, in the engine's order."""
    output_names: tuple[str, ...]
    """Names of the outputs, the logits first."""
    profiles: tuple[Profile, ...]
    """Batch sizes that the engine takes; empty where the batch is fixed."""
    _engine: Any
    _runtime: Any

    @property
    def max_batch(self) -> int | None:
        """Largest batch of any profile; None where the batch is fixed."""
        return max((profile.most for profile in self.profiles), default=None)

    def profile_index(self, batch: int) -> int:
        """Index of the profile that a batch runs with.

        Raises:
            UsageError: None covers it.
        """
        index = profile_for(batch, self.profiles) if self.profiles else 0
        if index is None:
            covered = ", ".join(map(str, self.profiles))
            raise UsageError(
                f"A batch of {batch} was given; the engine was built for batches of MIN:OPT:MAX {covered}. Build it "
                "with another --profile (rkd-deploy export MODEL --format ...), or name its ONNX file, of which bench "
                "builds an engine for the batches it measures."
            )
        return index

    def context(self) -> Any:
        """A new execution context.

        Raises:
            BackendError: Memory ran out.
        """
        if self._engine is None:
            raise BackendError("This engine is closed. Load it again.")
        if self.library.is_rtx:
            # Kernels for a new shape are compiled at its first run; later ones would miss the captured graph.
            runtime_config = self._engine.create_runtime_config()
            runtime_config.dynamic_shapes_kernel_specialization_strategy = (
                self.library.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self._engine.create_execution_context(runtime_config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise BackendError(
                f"{self.library.name} could not prepare a run: {self.library.drain()}. If memory ran out, close other "
                "programs on the GPU (nvidia-smi), or build the engine for smaller batches."
            )
        return context

    def layers(self) -> list[dict[str, Any]]:
        """Facts of each layer, from the engine inspector."""
        return engine_layers(self._engine, self.library.trt)

    def close(self) -> None:
        """Give the engine back; every context has to be gone by then."""
        self._engine = self._runtime = None


def load_engine(plan: bytes, record: EngineRecord | None, library: Library, gpu: Gpu, file: Path) -> LoadedEngine:
    """Deserialise an engine for the current device.

    Raises:
        BackendError: It was built for another GPU, library or version, or has not one numeric input, batch first.
        ModelFileError: It is damaged.
    """
    if record is not None:
        record.check_fits(library, gpu.name, gpu.capability)
    library.messages.clear()
    runtime = library.trt.Runtime(library.log)
    if record is not None and record.settings.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such an engine brings its own runtime
    if library.is_rtx and runtime.get_engine_validity(plan)[0] == library.trt.EngineValidity.INVALID:
        raise BackendError(
            f"{file} does not run on {gpu.name} ({gpu.capability}) with {library.name} {library.version}: "
            f"{library.drain()}. Build it again here with: rkd-deploy export MODEL --format {library.name}"
        )
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        where = f"{library.name} {library.version} on {gpu.name} ({gpu.capability})"
        reason = library.drain()
        raise failed_load(file, where, f"{where} says: {reason}")
    return _describe(engine, runtime, library, file)


def _describe(engine: Any, runtime: Any, library: Library, file: Path) -> LoadedEngine:
    trt = library.trt
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    shape = tuple(engine.get_tensor_shape(inputs[0])) if len(inputs) == 1 else ()
    if not shape or -1 in shape[1:]:
        raise BackendError(
            f"{file} takes {', '.join(inputs) or 'no input'}; rkd-deploy runs engines with one numeric input, only its "
            "batch free: export the classifier alone, with a fixed image size."
        )
    profiles: tuple[Profile, ...] = ()
    if shape[0] == -1:
        shapes = (engine.get_tensor_profile_shape(inputs[0], i) for i in range(engine.num_optimization_profiles))
        profiles = tuple(Profile(*(int(shape[0]) for shape in triple)) for triple in shapes)
    # Profiles that all cover one and the same batch make it fixed, as far as a caller can tell.
    sizes = {size for profile in profiles for size in (profile.least, profile.most)}
    batch = shape[0] if not profiles else sizes.pop() if len(sizes) == 1 else None
    spec = InputSpec(inputs[0], (batch, *shape[1:]), _dtype(engine, inputs[0], file))
    types = {name: _dtype(engine, name, file) for name in outputs}
    return LoadedEngine(library, spec, types, logits_first(file, outputs), profiles, engine, runtime)


def _dtype(engine: Any, name: str, file: Path) -> np.dtype[Any]:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise BackendError(
            f"Tensor {name!r} of {file} is of type {kind.lower()}, which NumPy has not. "
            "Export the model with inputs and outputs in float32: only what lies between may be narrower."
        )
    return np.dtype(_DTYPES[kind])


class EngineRun:
    """An execution context with the memory of one input shape, captured as a graph where that is wanted."""

    def __init__(self, engine: LoadedEngine, stream: Stream, *, transfers: bool, capture: bool) -> None:
        self._engine, self._stream, self._transfers, self._capture = engine, stream, transfers, capture
        self._context: Any = engine.context()
        self._shape: tuple[int, ...] | None = None
        self._profile = 0  # a new context's
        self._graph: Graph | None = None
        self._buffers: dict[str, Buffer] = {}

    @property
    def captured(self) -> bool:
        """Whether a run is the launch of a graph."""
        return self._graph is not None

    @property
    def input_host(self) -> Array:
        """Pinned memory that the input is uploaded from."""
        return self._buffers[self._engine.input.name].host

    def output_host(self, name: str) -> Array:
        """Pinned memory that an output is downloaded to."""
        return self._buffers[name].host

    def fit(self, shape: tuple[int, ...], x: Array | None = None) -> None:
        """Make ready for an input shape; does nothing where the shape is that of the last run.

        Args:
            shape: Shape of the input.
            x: Uploaded once, for a run without transfers.

        Raises:
            UsageError: No profile covers the batch.
            BackendError: Memory ran out, or the run failed.
        """
        if shape == self._shape:
            return
        self.release()
        self._choose_profile(shape[0])
        if not self._context.set_input_shape(self._engine.input.name, shape):
            raise self._failed("refuses the shape")
        try:
            self._allocate(shape)
            if x is not None:
                np.copyto(self.input_host, x)
                self._buffers[self._engine.input.name].upload(self._stream)
            # The first run of a shape settles things that must not be captured.
            self._enqueue()
            self._stream.synchronize()
            if self._capture and self._capturable():
                self._graph = self._stream.capture(self._enqueue)
        except BaseException:
            self.release()
            raise
        self._shape = shape

    def enqueue(self) -> None:
        """Enqueue one run of the input in the buffer: a launch of the graph where runs are captured."""
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()

    def layer_times(self, count: int) -> list[list[tuple[str, float]]]:
        """Name and milliseconds of each layer in each of `count` runs; `fit` comes first, and no graph is used.

        Raises:
            BackendError: A run failed.
        """
        profiler = layer_profiler(self._engine.library.trt)
        self._context.profiler = profiler
        runs = []
        for _ in range(count):
            profiler.times = []
            self._enqueue()
            self._stream.synchronize()
            runs.append(profiler.times)
        return runs

    def close(self) -> None:
        """Give the graph, the memory and the context back."""
        self.release()
        self._context = None

    def _choose_profile(self, batch: int) -> None:
        index = self._engine.profile_index(batch)
        if index != self._profile:
            if not self._context.set_optimization_profile_async(index, int(self._stream)):
                raise self._failed("refuses the profile")
            self._stream.synchronize()
            self._profile = index

    def _allocate(self, shape: tuple[int, ...]) -> None:
        spec = self._engine.input
        self._buffers[spec.name] = Buffer(shape, spec.dtype)
        for name, dtype in self._engine.outputs.items():
            output = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if -1 in output:
                raise BackendError(f"The size of output {name!r} depends on the data ({list(output)}); logits do not.")
            if name == self._engine.output_names[0]:
                check_rows(output, shape[0])
            # Every output gets memory, asked for or not: an engine does not run with an address missing.
            self._buffers[name] = Buffer(output, dtype)
        for name, buffer in self._buffers.items():
            if not self._context.set_tensor_address(name, buffer.device):
                raise self._failed(f"refuses the memory of {name!r}")

    def _enqueue(self) -> None:
        if self._transfers:
            self._buffers[self._engine.input.name].upload(self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise self._failed("failed to run the model")
        if self._transfers:
            for name in self._engine.output_names:
                self._buffers[name].download(self._stream)

    def _capturable(self) -> bool:
        if not self._engine.library.is_rtx:
            return True
        # RTX still compiles kernels, or allocates, for some shapes at run time, which a capture cannot hold.
        return bool(self._context.is_stream_capturable(int(self._stream)))

    def release(self) -> None:
        """Give the graph and the memory back; the next `fit` makes both anew."""
        self._shape = None
        graph, self._graph = self._graph, None
        buffers, self._buffers = self._buffers, {}
        if buffers:
            with suppress(BackendError):  # a run that broke off may have left copies behind that still use the memory
                self._stream.synchronize()
        if graph is not None:
            graph.close()
        for buffer in buffers.values():
            buffer.close()

    def _failed(self, what: str) -> BackendError:
        library = self._engine.library
        return BackendError(f"{library.name} {library.version} {what}: {library.drain()}.")

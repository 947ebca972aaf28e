"""Backends that run an engine of TensorRT or TensorRT-RTX on a GPU, as one CUDA graph.

A run is upload, `execute_async_v3` and download on a stream of the backend's own, from and to pinned memory. Captured
into a CUDA graph it is one launch; another input shape is captured anew. No torch is needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from rkd_deploy.backends.files import ENGINE_SUFFIXES, model_path
from rkd_deploy.backends.protocol import (
    Array,
    Backend,
    LayerRun,
    LayerTime,
    ModelInfo,
    Progress,
    closed_backend,
    parse_device,
)
from rkd_deploy.backends.runtimes import RunOn
from rkd_deploy.backends.tensorrt.cache import cached_engine
from rkd_deploy.backends.tensorrt.cuda import Gpu, Stream, call, find_gpu, gpu_count
from rkd_deploy.backends.tensorrt.engine import EngineRun, LoadedEngine, load_engine
from rkd_deploy.backends.tensorrt.record import EngineRecord, engine_path, read_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Library, Profile, check_gpu, load_library
from rkd_deploy.errors import BackendError, ModelFileError, UsageError, command_line
from rkd_deploy.storage import sha256_of


class TensorRtBackend(Backend):
    """An engine on one GPU; threads may share it, and take turns."""

    name = "tensorrt"

    def __init__(
        self,
        path: str | os.PathLike[str],
        run_on: RunOn | None = None,
        *,
        settings: EngineSettings | None = None,
        batches: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """Load an engine; of an ONNX file, build it first, once for this GPU, version and settings.

        Args:
            path: An engine file; a bundle folder, whose engine is taken if there is one; or an ONNX file.
            run_on: Where, and whether runs are captured. Default: the first GPU, captured.
            settings: How to build where an engine has to be built.
            batches: Batch sizes that the engine has to take.
            progress: Called with the phase of a build, and how far it is.

        Raises:
            UsageError: A thread count, settings that the library does not have, or an engine that does
                not take one of the batches.
            MissingDependencyError: The library, cuda-bindings, or onnx for a build, is not installed.
            ModelFileError: The file is missing or corrupt, or the engine is not that of the model beside it.
            BackendError: There is no such GPU, the engine is another GPU's or version's, or memory ran out.
        """
        self._engine: LoadedEngine | None = None
        self._stream: Stream | None = None
        self._runs: list[EngineRun] = []
        self._lock = threading.RLock()
        library, run_on = load_library(self.name), run_on or RunOn(self.name)
        gpu = _gpu(self.name, run_on)
        check_gpu(library, gpu.name, gpu.capability)
        self.device = f"cuda:{gpu.index}"
        # TensorRT takes whatever device is current when a runtime or a context is made; there is no argument for it.
        call("cudaSetDevice", gpu.index)
        settings = settings or EngineSettings()
        file, plan, record, build_seconds = _engine_of(Path(path), library, gpu, settings, progress)
        self.precision = "unknown" if record is None else record.precision
        self._gpu, self._capture = gpu, run_on.cuda_graph
        try:
            self._engine = load_engine(plan, record, library, gpu, file)
            for batch in batches:
                self._engine.profile_index(batch)
            self._stream = Stream()
            self._infer = EngineRun(self._engine, self._stream, transfers=True, capture=self._capture)
            self._runs.append(self._infer)
        except BaseException:
            self.close()
            raise
        self._input = self._engine.input
        self._info = ModelInfo(
            input_name=self._input.name,
            input_shape=self._input.shape,
            input_dtype=self._input.dtype.name,
            outputs=self._engine.output_names,
            max_batch=self._engine.max_batch,
            metadata={} if record is None else dict(record.metadata),
            file=file,
            build_seconds=build_seconds,
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        run_on: RunOn,
        *,
        batches: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Load an engine, a bundle folder or an .onnx file (see the class); what is built is built for `batches`."""
        settings = EngineSettings(profiles=(Profile.around(batches),)) if batches else None
        return cls(path, run_on, settings=settings, batches=batches or (), progress=progress)

    @property
    def info(self) -> ModelInfo:
        """What the engine takes and gives; `cuda_graph` is known after the first run, the metadata are the ONNX's."""
        return replace(self._info, cuda_graph=any(run.captured for run in self._runs))

    def infer(self, x: Array) -> Array:
        """Run one batch, host to host: upload, run and download as one enqueued piece; threads take turns."""
        return self._outputs(x, self._info.outputs[:1])[0]

    def infer_all(self, x: Array) -> tuple[Array, ...]:
        """Run one batch as `infer` does, and give every output."""
        return self._outputs(x, self._info.outputs)

    def _outputs(self, x: Array, names: Sequence[str]) -> tuple[Array, ...]:
        with self._lock:
            stream = self._live()
            self._input.check(x)
            self._infer.fit(x.shape)
            np.copyto(self._infer.input_host, x)
            try:
                self._infer.enqueue()
                stream.synchronize()
            except BackendError:
                self._infer.release()  # the next call starts with memory and a graph of its own
                raise
            return tuple(self._infer.output_host(name).copy() for name in names)

    def prepare(self, x: Array) -> Callable[[], None]:
        """Copy `x` to device memory of its own, held until the backend is closed; each call enqueues one run."""
        with self._lock:
            stream = self._live()
            self._input.check(x)
            assert self._engine is not None
            prepared = EngineRun(self._engine, stream, transfers=False, capture=self._capture)
            prepared.fit(x.shape, x)
            self._runs.append(prepared)

        def run() -> None:
            with self._lock:
                self._live()
                prepared.enqueue()

        return run

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """Times of the layers after fusion; an engine that was built without detail gives their names alone."""
        with self._lock:
            stream = self._live()
            self._input.check(x)
            assert self._engine is not None
            known = {layer["name"]: layer for layer in self._engine.layers()}
            # A context of its own, and no graph: the profiler is told of layers only when a context executes them one
            # by one.
            run = EngineRun(self._engine, stream, transfers=False, capture=False)
            try:
                run.fit(x.shape, x)
                times = run.layer_times(count)
            finally:
                run.close()

        def described(name: str, ms: float) -> LayerTime:
            layer = known.get(name, {})
            return LayerTime(name, str(layer.get("type", "")), ms, layer.get("dtype") or None)

        return [[described(*layer) for layer in layers] for layers in times]

    def synchronize(self) -> None:
        """Wait until the backend's stream is empty."""
        self._live().synchronize()

    def close(self) -> None:
        """Give graphs, contexts, engine, memory and stream back, in this order."""
        with self._lock:
            stream, self._stream = self._stream, None
            engine, self._engine = self._engine, None
            if stream is not None:
                call("cudaSetDevice", self._gpu.index)
                stream.synchronize()
                # What is enqueued still reads this memory. Contexts go before the engine that made them, the stream
                # last of all.
                for run in self._runs:
                    run.close()
                self._runs = []
            if engine is not None:
                engine.close()
            if stream is not None:
                stream.close()

    def _live(self) -> Stream:
        if self._stream is None:
            raise closed_backend(self.name)
        call("cudaSetDevice", self._gpu.index)  # each thread has a current device of its own
        return self._stream


class TensorRtRtxBackend(TensorRtBackend):
    """An engine of TensorRT-RTX on one GPU."""

    name = "tensorrt-rtx"


def devices() -> tuple[str, ...]:
    """Devices that an engine would run on here.

    Raises:
        BackendError: There is none; the message says what is missing.
        MissingDependencyError: cuda-bindings is not installed.
    """
    if gpu_count() == 0:
        raise BackendError("CUDA finds no device.")
    return ("cuda",)


def _engine_of(
    path: Path, library: Library, gpu: Gpu, settings: EngineSettings, progress: Progress | None
) -> tuple[Path, bytes, EngineRecord | None, float | None]:
    """The engine that is meant by a path: file, content, record, and the seconds of its build if it was built now."""
    file = model_path(path)
    if file.suffix in ENGINE_SUFFIXES:
        return file, *read_engine(file), None
    beside = engine_path(file, library.name)
    if path.is_dir() and beside.is_file():
        plan, record = read_engine(beside)
        if record is not None and record.onnx_sha256 != sha256_of(file):
            raise ModelFileError(
                f"{beside} was built of another model than the {file.name} beside it. "
                f"Build it again with: {command_line('export', path, '--format', library.name)}"
            )
        return beside, plan, record, None
    cached = cached_engine(file, library, gpu, settings, progress)
    return cached.file, cached.plan, cached.record, cached.record.build_seconds if cached.built else None


def _gpu(name: str, run_on: RunOn) -> Gpu:
    kind, index = parse_device(run_on.where)
    if kind == "cpu":
        raise BackendError(f"Device 'cpu' was asked for; the {name} backend runs on device='cuda' or 'cuda:N' only.")
    if run_on.threads is not None:
        raise UsageError(f"threads is {run_on.threads}; an engine runs on a GPU, where it has no effect. Leave it out.")
    gpu = find_gpu(index)
    assert gpu is not None
    return gpu

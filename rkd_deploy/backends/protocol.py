"""`Backend`: a loaded model that runs, the same for every runtime.

Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends.files import broken_model
from rkd_deploy.errors import BackendError, UsageError, shortened

Array: TypeAlias = npt.NDArray[Any]

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""


class LayerTime(NamedTuple):
    """One layer of one run, as the runtime reports it."""

    name: str
    op: str
    """Type of the layer, as the runtime calls it."""
    ms: float
    precision: str | None = None
    """Type that the layer works on, NumPy's name where it has one; None where the runtime does not report it."""


LayerRun: TypeAlias = list[LayerTime]
"""All layers of one run, in order."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a loaded model takes and gives, and what it was loaded from.

    Attributes:
        input_name: Name of the one input.
        input_shape: Shape of the input, batch first; None is a dimension that the caller chooses.
        input_dtype: NumPy name of the input's type.
        outputs: Names of the outputs, the logits first.
        max_batch: Largest batch where the caller chooses it; None: what the memory holds.
        metadata: What the model file says about itself; empty where the format holds nothing.
        file: What runs: ONNX file, exported program or engine; None: a module in memory.
        cuda_graph: Whether runs are launches of a captured CUDA graph; None where the backend knows no such thing.
        error_lines: Lines of cuDNN's that a runtime wrote while it chose its kernels on CUDA, and that were kept from
            the terminal; None where none are looked for.
        build_seconds: What building the engine took, where loading had to do that; else None.
    """

    input_name: str
    input_shape: tuple[int | None, ...]
    input_dtype: str
    outputs: tuple[str, ...] = ("logits",)
    max_batch: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    cuda_graph: bool | None = None
    error_lines: int | None = None
    build_seconds: float | None = None


class Backend(Protocol):
    """A loaded model on one device. It neither times nor prints; after `close` every use raises BackendError.

    Its core are seven members: `name`, `device`, `precision`, `infer`, `prepare`, `synchronize`, `close`. `info` is
    what else there is to know of the model, and `layer_runs` stays as it is where a runtime has no profile.
    """

    name: str
    """Name of the backend, one that `RunOn.backend` takes."""
    device: str
    """Where the model runs: "cpu" or "cuda:N"; never where it was merely asked to run."""
    precision: str
    """Precision of the model's arithmetic: fp32, fp16, int8, ...; "unknown" where the file does not say."""

    @property
    def info(self) -> ModelInfo:
        """What the model takes and gives, and what it was loaded from."""
        ...

    def infer(self, x: Array) -> Array:
        """Run once, host to host.

        Args:
            x: [N, ...] of the shape and type in `info`.

        Returns:
            Logits [N, K].

        Raises:
            UsageError: `x` has another type or shape; the message names both.
            BackendError: The run failed, gave another number of rows than N, or the backend is closed. The next call
                with a valid input works, unless the device itself is lost.
        """
        ...

    def infer_all(self, x: Array) -> tuple[Array, ...]:
        """Run once, host to host, and give every output, in the order of `info.outputs`.

        Args:
            x: As for `infer`.

        Raises:
            UsageError: `x` has another type or shape.
            BackendError: As for `infer`; or the file has several outputs, and this backend gives the logits alone.
        """
        if len(self.info.outputs) > 1:
            raise BackendError(
                f"{self.info.file} has the outputs {', '.join(self.info.outputs)}, of which the {self.name} backend "
                "gives the first alone. Run it on onnxruntime, openvino or tensorrt."
            )
        return (self.infer(x),)

    def prepare(self, x: Array) -> Callable[[], None]:
        """Copy `x` to the device once; each call of what is returned enqueues one run there.

        Raises:
            UsageError: `x` has another type or shape.
            BackendError: The backend is closed.
        """
        ...

    def synchronize(self) -> None:
        """Wait until every enqueued run is done."""
        ...

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """Run `count` times with profiling on, and give the layers of each run; empty where the runtime has no profile.

        Profiling costs time in every layer. A runtime that profiles whole sessions loads the model once more for it.

        Args:
            x: As for `infer`.
            count: Number of runs.

        Raises:
            UsageError: `x` has another type or shape.
            BackendError: A run failed, or the backend is closed.
        """
        return []

    def close(self) -> None:
        """Give the model's memory back; a second call does nothing."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class InputSpec:
    """The one input of a model, and the check that an array fits it."""

    name: str
    shape: tuple[int | None, ...]
    """Sizes of the dimensions, batch first; None is free."""
    dtype: np.dtype[Any]
    _tail: tuple[int | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tail", self.shape[1:])

    def check(self, x: Array) -> None:
        """Refuse an array that does not fit.

        Raises:
            UsageError: Another type or shape; the message names both.
        """
        # This runs before every prediction: the usual case, free batch and fixed rest, is three comparisons.
        if isinstance(x, np.ndarray) and x.dtype == self.dtype:
            shape = x.shape
            if self.shape[0] is None and shape and shape[0] > 0 and shape[1:] == self._tail:
                return
            if len(shape) == len(self.shape) and all(
                size == wanted or (wanted is None and size > 0) for size, wanted in zip(shape, self.shape, strict=True)
            ):
                return
        array = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
        raise UsageError(
            f"Input {self.name!r} was given {array}; the model takes a NumPy array {self.dtype} [{wanted}], "
            "batch first. Convert the array, or let rkd_deploy.load(...) prepare images for the model."
        )


def check_rows(shape: Sequence[int], batch: int) -> None:
    """Refuse an answer that has not one row for each input.

    Raises:
        BackendError: The first dimension is another number than the batch.
    """
    if not shape or shape[0] != batch:
        raise BackendError(
            f"The model gave an answer of shape {list(shape)} for a batch of {batch}; it must have one row for each "
            "image. A batch size is probably fixed inside the file, by a Reshape say, whose input calls it free: run "
            "the model at that batch size, or export it again with a free batch."
        )


_CHUNK_NUMBERS = 1 << 18
"""Numbers of an input that are run at once: 85 images of 32 x 32 in colour, 1 of 224 x 224."""


def infer_many(backend: Backend, x: Array, max_batch: int | None = None) -> Array:
    """Logits of any number of inputs, in chunks that the model and the memory can take.

    A model with a fixed batch gets exactly that: its last chunk is filled up with copies, whose logits are dropped.

    Args:
        backend: The model.
        x: [N, ...], N at least 1.
        max_batch: Largest chunk where the model leaves the batch free. Default: 256 small images, fewer large ones,
            because a network's maps are many times as large as its input.

    Returns:
        [N, K].

    Raises:
        UsageError: `x` does not fit the model.
    """
    (logits_NK,) = _in_chunks(lambda chunk: (backend.infer(chunk),), backend.info, x, max_batch)
    return logits_NK


def infer_all_many(backend: Backend, x: Array) -> tuple[Array, ...]:
    """Every output of a model for any number of inputs, in chunks as `infer_many` has them.

    Raises:
        UsageError: `x` does not fit the model.
        BackendError: The backend gives logits alone.
    """
    return _in_chunks(backend.infer_all, backend.info, x, None)


def _in_chunks(
    run: Callable[[Array], tuple[Array, ...]], info: ModelInfo, x: Array, max_batch: int | None
) -> tuple[Array, ...]:
    fixed = info.input_shape[0]
    max_batch = max_batch or min(256, max(1, _CHUNK_NUMBERS // math.prod(x.shape[1:])))
    max_batch = min(max_batch, info.max_batch or max_batch)
    count = len(x)
    if count <= max_batch if fixed is None else count == fixed:
        return run(x)
    size = fixed or max_batch
    parts = []
    for start in range(0, count, size):
        chunk = x[start : start + size]
        missing = 0 if fixed is None else fixed - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        parts.append([output[: size - missing] for output in run(chunk)])
    if not parts:
        raise UsageError("A batch of 0 inputs was given; a model takes at least 1.")
    return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))


def parse_device(device: str) -> tuple[str, int]:
    """Kind and index of a device name: "cpu" -> ("cpu", 0), "cuda" -> ("cuda", 0), "cuda:1" -> ("cuda", 1).

    Raises:
        UsageError: Another name.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise UsageError(f"Unknown device {shortened(device)}. Choices: cpu, cuda, cuda:N (N counts from 0).")
    return device.split(":")[0], int(match[1] or 0)


def logits_first(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Names of a model's outputs, the logits in front: the one of that name, else the first.

    Raises:
        ModelFileError: There are none.
    """
    if not names:
        raise broken_model(file, "it has no outputs")
    first = "logits" if "logits" in names else names[0]
    return (first, *(name for name in names if name != first))


def closed_backend(name: str) -> BackendError:
    """The error for any use after `close`."""
    return BackendError(f"This {name} backend is closed. Load the model again with load_backend({name!r}, path).")

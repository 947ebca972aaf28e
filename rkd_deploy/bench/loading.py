"""Loads the models of a bench, and makes the batches that they are timed on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends import Array, Backend, RunOn
from rkd_deploy.backends.files import model_name, model_path, read_card
from rkd_deploy.backends.tensorrt.cache import cache_folder
from rkd_deploy.bench.machine import available_bytes, device_used_bytes, resident_bytes
from rkd_deploy.bench.settings import USUAL_BATCHES, PathLike
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import BackendError, UsageError
from rkd_deploy.storage import sha256_of


def load_model(
    path: PathLike, run_on: RunOn, batches: Sequence[int] | None = None, progress: Progress | None = None
) -> Backend:
    """Load a model once, and report the build of its engine; arguments and errors as for `RunOn.load`."""
    name = model_name(path)

    def building(phase: str, share: float) -> None:
        if progress is not None:
            progress(f"building the engine of {name}: {phase}", share)

    return run_on.load(path, batches=batches, progress=building)


@dataclass(frozen=True)
class Loaded:
    """A model to measure, loaded once for each stream, and what loading it took."""

    key: str
    """Name of the model, made unique by its number."""
    name: str
    file: Path
    """The file that the backend runs: ONNX file, exported program or engine."""
    sha256: str
    backends: tuple[Backend, ...]
    card: ModelCard | None
    load_seconds: float
    build_seconds: float | None
    engine_kept: str | None
    resident_load_bytes: int | None

    @property
    def backend(self) -> Backend:
        """The backend of the first stream."""
        return self.backends[0]


def load_all(
    models: Sequence[PathLike],
    run_on: RunOn,
    stack: ExitStack,
    batches: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Loaded]:
    """Load models one after the other, for as long as a stack lasts.

    Args:
        models: As for `bench`.
        run_on: Where, and how many streams.
        stack: Closes them.
        batches: Batch sizes they will be run at; None: the usual ones, or whatever an engine takes.
        progress: Called with the phase of an engine's build, and the share of it that is done.

    Raises:
        RkdError: As `RunOn.load` raises it; the card is corrupt.
    """
    return [_load(number, path, run_on, stack, batches, progress) for number, path in enumerate(models)]


def _load(
    number: int,
    path: PathLike,
    run_on: RunOn,
    stack: ExitStack,
    batches: Sequence[int] | None,
    progress: Progress | None,
) -> Loaded:
    before, started = resident_bytes(), time.perf_counter()
    backends = tuple(stack.enter_context(load_model(path, run_on, batches, progress)) for _ in range(run_on.streams))
    seconds, after = time.perf_counter() - started, resident_bytes()
    info = backends[0].info
    card = read_card(path, info.metadata)
    name = card.name if card is not None else model_name(path)
    file = info.file or model_path(path)
    return Loaded(
        key=f"{number + 1} {name}",
        name=name,
        file=file,
        sha256=sha256_of(file),
        backends=backends,
        card=card,
        # An engine is built by the first stream alone, and comes out of the cache for the others.
        load_seconds=(seconds - (info.build_seconds or 0)) / len(backends),
        build_seconds=info.build_seconds,
        engine_kept=file.parent.name if run_on.runs_engines and file.parent.parent == cache_folder() else None,
        resident_load_bytes=None if before is None or after is None else after - before,
    )


def resolve_batches(models: Sequence[Loaded], batches: Sequence[int] | None) -> Sequence[int]:
    """Batch sizes to measure at: those asked for, else the usual ones, or the models' own where it is fixed.

    Raises:
        UsageError: A model does not take a batch size, or the models' fixed sizes differ.
    """
    fixed = {loaded.name: loaded.backend.info.input_shape[0] for loaded in models}
    sizes = {size for size in fixed.values() if size is not None}
    if batches is None and len(sizes) > 1:
        raise UsageError(
            f"The models take batches of their own, which differ: {fixed}. They cannot be compared with one another: "
            "measure each in a bench of its own."
        )
    most = min(loaded.backend.info.max_batch or max(USUAL_BATCHES) for loaded in models)
    chosen = batches if batches is not None else sorted(sizes) or [size for size in USUAL_BATCHES if size <= most]
    for loaded in models:
        for batch in chosen:
            _check_batch(loaded.backend, batch)
    return chosen


def _check_batch(backend: Backend, batch: int) -> None:
    fixed = backend.info.input_shape[0]
    if fixed not in (None, batch):
        raise UsageError(
            f"A batch of {batch} was asked for, and the model takes {fixed} images at a time, no more and no less. "
            f"Ask for batch {fixed}, or export the model with a free batch."
        )


def random_input(
    backend: Backend, card: ModelCard | None, batch: int, seed: int, shape: Sequence[int] | None = None
) -> Array:
    """A seeded batch of noise in a model's input type: uniform bytes, or standard normal numbers.

    Args:
        backend: The model.
        card: Gives the image size where the model leaves it open.
        batch: Number of inputs.
        seed: Seed of the noise.
        shape: Shape of one input without the batch; needed where the model leaves it open and there is no card.

    Raises:
        UsageError: The model has another fixed batch or shape, or leaves its image size open and has no card.
        BackendError: The batch alone is more than the memory that is free.
    """
    _check_batch(backend, batch)
    size = (batch, *_shape(backend, card, shape))
    dtype = np.dtype(backend.info.input_dtype)
    needed, free = math.prod(size) * max(dtype.itemsize, 4), available_bytes()
    if free is not None and 2 * needed > free:  # the backend copies it at least once
        raise BackendError(
            f"A batch of {batch} inputs {list(size[1:])} takes {needed:,} bytes, and twice that is more than the "
            f"{free:,} bytes of memory that are free. Use a smaller batch."
        )
    generator = np.random.default_rng(seed)
    # Noise, and no zeros: a network that is fed zeros computes with zeros and denormal numbers, which some
    # processors take at another speed.
    if np.issubdtype(dtype, np.integer):
        high = min(256, np.iinfo(dtype).max + 1)
        return generator.integers(0, high, size, np.dtype(dtype.type))
    return generator.standard_normal(size, np.float32).astype(dtype, copy=False)


def _shape(backend: Backend, card: ModelCard | None, shape: Sequence[int] | None) -> tuple[int, ...]:
    sizes = backend.info.input_shape[1:]
    if shape is None:
        shape = card.preprocess.input_shape if card is not None else [size for size in sizes if size is not None]
        if len(shape) != len(sizes):
            raise UsageError(
                f"The model takes inputs of {list(backend.info.input_shape)}, None being free, and has no card that "
                "says which size it is meant for. Give it with --shape, for example --shape 3,224,224, or export the "
                "model with a fixed image size."
            )
    if len(shape) != len(sizes) or any(want not in (None, size) for size, want in zip(shape, sizes, strict=True)):
        raise UsageError(
            f"Inputs of {list(shape)} were asked for, and the model takes {list(sizes)} after the batch, None being "
            "free. Give a shape that fits, or leave it out."
        )
    return tuple(shape)


def device_in_use(run_on: RunOn) -> int | None:
    """Memory in use on the GPU that models run on, by any program; None on a CPU."""
    return device_used_bytes(run_on.where)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at a batch size, where and how it ran."""

    model: str
    file_bytes: int
    backend: str
    device: str
    threads: int | None
    """Number of threads that was asked for; None left it to the runtime."""
    batch: int

    @classmethod
    def of(cls, result: Any) -> Case:
        """The case of anything that has these fields: what shares a case belongs to the same measurement."""
        return Case(**{field.name: getattr(result, field.name) for field in fields(Case)})

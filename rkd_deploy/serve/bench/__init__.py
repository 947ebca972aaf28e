"""Benches: how fast a model is (`timing`), whether it is right (`parity`, `accuracy`), and the report of both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rkd_deploy.card import ModelCard
from rkd_deploy.errors import UsageError
from rkd_deploy.serve.backends import Array, Backend, load_backend
from rkd_deploy.serve.bench.report import Result
from rkd_deploy.serve.bench.timing import Progress, Timing, measure_interleaved
from rkd_deploy.serve.files import model_name, model_path, read_card

__all__ = ["Result", "Timing", "bench"]


@dataclass(frozen=True)
class _Subject:
    """One model to measure."""

    key: str
    """Its name, made unique."""
    name: str
    file: Path
    backend: Backend
    card: ModelCard | None


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    batches: Sequence[int] = (1, 8, 32),
    threads: int | None = None,
    min_seconds: float = 2.0,
    min_runs: int = 100,
    warmup_seconds: float = 0.5,
    transfers: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """Time models against one another, by turns, at each batch size, on seeded random inputs.

    Args:
        models: Bundle folders or ONNX files, with or without a card.
        backend: As for `load_backend`, and so `device` and `threads`.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
        batches: Numbers of images in one call.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        min_seconds: Time in timed calls of each model at each batch size, at least.
        min_runs: Number of those calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        transfers: True times host to host; False device-resident runs.
        seed: Of the inputs.
        progress: Told what is being measured, and how far it is.

    Returns:
        A result for each batch size and model, in that order.

    Raises:
        UsageError: Nothing to measure, or a model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: The backend cannot run here, or not on the device asked for.
    """
    if not models or not batches or min(batches) < 1:
        raise UsageError(
            f"bench was given {len(models)} models and the batch sizes {list(batches)}; "
            "it needs at least one of each, and batches of at least 1."
        )
    results = []
    with ExitStack() as stack:
        subjects = [_open(number, path, backend, device, threads, stack) for number, path in enumerate(models)]
        for batch in batches:
            turns = {s.key: (s.backend, random_input(s.backend, s.card, batch, seed)) for s in subjects}
            timings = measure_interleaved(
                turns,
                min_seconds=min_seconds,
                min_runs=min_runs,
                warmup_seconds=warmup_seconds,
                transfers=transfers,
                progress=progress,
            )
            results += [_result(subject, timings[subject.key], threads) for subject in subjects]
    return results


def random_input(backend: Backend, card: ModelCard | None, batch: int, seed: int) -> Array:
    """A batch of noise that the model takes: any byte, or standard normal numbers.

    Raises:
        UsageError: The model has another fixed batch, or leaves its image size open and has no card.
    """
    fixed, *sizes = backend.input_shape
    if fixed not in (None, batch):
        raise UsageError(
            f"A batch of {batch} was asked for, and the model takes {fixed} images at a time, no more and no less. "
            f"Ask for batch {fixed}, or export the model with a free batch."
        )
    tail = card.preprocess.input_shape if card is not None else tuple(size for size in sizes if size is not None)
    if len(tail) != len(sizes):
        raise UsageError(
            f"The model takes inputs of {list(backend.input_shape)}, None being free, and has no card that says which "
            "size it is meant for. Export it with a fixed image size."
        )
    generator = np.random.default_rng(seed)
    dtype = np.dtype(backend.input_dtype)
    if np.issubdtype(dtype, np.integer):
        high = min(256, np.iinfo(dtype).max + 1)
        return generator.integers(0, high, (batch, *tail)).astype(dtype)
    return generator.standard_normal((batch, *tail), np.float32).astype(dtype)


def _open(
    number: int,
    path: str | os.PathLike[str],
    backend: str,
    device: str | None,
    threads: int | None,
    stack: ExitStack,
) -> _Subject:
    loaded = stack.enter_context(load_backend(backend, path, device=device, threads=threads))
    card = read_card(path, loaded.metadata())
    name = card.name if card is not None else model_name(path)
    return _Subject(f"{number + 1} {name}", name, model_path(path), loaded, card)


def _result(subject: _Subject, timing: Timing, threads: int | None) -> Result:
    card = subject.card
    accuracy = None if card is None else card.metrics.get("accuracy")
    return Result.from_timing(
        timing,
        model=subject.name,
        part=None if card is None else card.part,
        fusion=None if card is None else card.fusion,
        backend=subject.backend.name,
        device=subject.backend.device,
        threads=threads,
        precision=subject.backend.precision,
        accuracy=float(accuracy) if isinstance(accuracy, int | float) else None,
        parameters=None if card is None else card.parameters or None,  # a card without the number has 0
        macs=None if card is None else card.macs or None,
        build_seconds=subject.backend.build_seconds,
        file_bytes=subject.file.stat().st_size,
    )

"""Settings of a bench: where models run, at which batch sizes, for how long, on what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rkd_deploy.backends import RunOn, check_backend, default_device
from rkd_deploy.backends.files import check_files
from rkd_deploy.bench.timing import TimingLimits
from rkd_deploy.errors import UsageError, shortened
from rkd_deploy.fields import check_number

USUAL_BATCHES = (1, 8, 32)
PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a bench; every model is measured in the same way.

    Attributes:
        run_on: Places where models run, measured one after the other.
        batches: Numbers of images in one call; None: 1, 8 and 32, or the models' own where it is fixed.
        min_seconds: Time in timed calls of each model at each batch size, at least.
        min_runs: Number of those calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        transfers: True times host to host, False device-resident runs, None both, in turns.
        seed: Seed of the random inputs.
        shape: Shape of one input, for models that leave it open and have no card.
        data: Folder of images, one folder for each class: the accuracy of each model on each backend is measured there.

    Raises:
        UsageError: Nowhere to run, no batch size, or a number out of range.
    """

    run_on: tuple[RunOn, ...] = (RunOn(),)
    batches: tuple[int, ...] | None = USUAL_BATCHES
    min_seconds: float = 2.0
    min_runs: int = 100
    warmup_seconds: float = 0.5
    transfers: bool | None = True
    seed: int = 0
    shape: tuple[int, ...] | None = None
    data: Path | None = None

    def __post_init__(self) -> None:
        _ = self.limits  # refused here, before anything is loaded
        check_number("seed", self.seed, 0, whole=True)
        for name, numbers in (("batches", self.batches), ("shape", self.shape)):
            if not isinstance(numbers, Sequence | None) or isinstance(numbers, str | bytes):
                raise UsageError(f"{name} = {shortened(numbers)} must be a tuple of whole numbers, e.g. (1, 8).")
            for number in numbers or ():
                check_number(name, number, 1, whole=True)
        if not self.run_on or self.batches == ():
            raise UsageError(
                f"A bench was given {len(self.run_on)} backends and the batch sizes {self.batches}; it needs at least "
                "one of each."
            )

    @property
    def limits(self) -> TimingLimits:
        """How long each model is timed at each batch size."""
        return TimingLimits(min_seconds=self.min_seconds, min_runs=self.min_runs, warmup_seconds=self.warmup_seconds)

    def to_record(self) -> dict[str, Any]:
        """The "settings" of a record: backends, threads and streams as lists, since every combination was run."""
        first = self.run_on[0]
        threads = dict.fromkeys(place.threads for place in self.run_on if place.threads is not None)
        return {
            "backend": list(dict.fromkeys(place.backend for place in self.run_on)),
            "device": first.device,
            "batches": None if self.batches is None else list(self.batches),
            "threads": list(threads) or None,
            "streams": list(dict.fromkeys(place.streams for place in self.run_on)),
            "memory_limit": first.memory_limit,
            "cuda_graph": first.cuda_graph,
            "shape": None if self.shape is None else list(self.shape),
            "min_seconds": self.min_seconds,
            "min_runs": self.min_runs,
            "warmup_seconds": self.warmup_seconds,
            "transfers": self.transfers,
            "data": None if self.data is None else self.data.name,
        }


def combinations(
    backends: Sequence[str],
    *,
    device: str | None = None,
    threads: Sequence[int] | None = None,
    streams: Sequence[int] = (1,),
    memory_limit: int | None = None,
    cuda_graph: bool = True,
) -> tuple[RunOn, ...]:
    """Places to run: every backend with every number of threads and streams.

    A backend that runs on GPUs only has no threads: beside others it is measured once, whatever the thread counts.

    Args:
        backends: As `RunOn.backend`.
        device: As `RunOn.device`, the same for every backend.
        threads: Thread counts; None leaves the number to the runtime.
        streams: Numbers of callers at once.
        memory_limit: Most bytes of device memory.
        cuda_graph: Whether engines' runs are captured.

    Raises:
        UsageError: As `RunOn` raises it.
    """
    mixed = any(default_device(name) == "cpu" for name in backends)
    return tuple(
        RunOn(name, device=device, threads=count, streams=number, memory_limit=memory_limit, cuda_graph=cuda_graph)
        for name in dict.fromkeys(backends)
        for count in ((None,) if threads is None or (mixed and default_device(name) != "cpu") else threads)
        for number in streams
    )


def check_models(models: Sequence[PathLike], run_on: Sequence[RunOn]) -> None:
    """Refuse models that cannot be measured, before anything is loaded.

    So a bench of many backends does not end at its last one after an hour.

    Raises:
        UsageError: No model, or an engine for a backend that runs none.
        MissingDependencyError: A backend is not installed.
        BackendError: PyTorch, of a model without an exported program.
        ModelFileError: A model is missing, empty or unreadable; or a file of a bundle is not as it was written.
    """
    if not models:
        raise UsageError("A bench was given 0 models; it needs at least one: bundle folders, ONNX files or engines.")
    for backend in dict.fromkeys(place.backend for place in run_on):
        check_backend(backend)
    for path in models:
        for place in dict.fromkeys(replace(place, streams=1, threads=None) for place in run_on):
            place.check_file(path)
        check_files(path, complete=False)

"""Benches: how fast a model is (`timing`), whether it is right (`parity`, `accuracy`), and the report of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.bench import machine
from rkd_deploy.bench.accuracy import folder_top1
from rkd_deploy.bench.loading import Loaded, Setting, batch_sizes, device_in_use, load_all, plan, random_input
from rkd_deploy.bench.machine import Pace, cores
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.bench.timing import MeasurementInterrupted, Progress, Subject, check_limits, measure_subjects

__all__ = ["Result", "Timing", "bench", "random_input"]


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    backend: str | Sequence[str] = "onnxruntime",
    device: str | None = None,
    batches: Sequence[int] | None = (1, 8, 32),
    threads: int | Sequence[int | None] | None = None,
    streams: int | Sequence[int] = 1,
    memory_limit: int | None = None,
    cuda_graph: bool = True,
    min_seconds: float = 2.0,
    min_runs: int = 100,
    warmup_seconds: float = 0.5,
    transfers: bool | None = True,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    data: Path | None = None,
    progress: Progress | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Time models against one another, by turns, at each batch size, on seeded random inputs.

    Args:
        models: Bundle folders, ONNX files or engines, with or without a card.
        backend: One or several, as for `load_backend`; they are measured one after the other.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
        batches: Numbers of images in one call; None: 1, 8 and 32, or the models' own where it is fixed.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime. Of several, each is measured.
        streams: Callers at once, each with the model loaded for itself. Of several numbers, each is measured.
        memory_limit: As for `load_backend`, and so `cuda_graph`; refused where they have no effect on a backend.
        cuda_graph: False measures engines without CUDA graphs.
        min_seconds: Time in timed calls of each model at each batch size, at least.
        min_runs: Number of those calls, at least.
        warmup_seconds: Time in untimed calls before, at least.
        transfers: True times host to host, False device-resident runs, None both, in turns.
        seed: Of the inputs.
        shape: Of one input, for models that leave it open and have no card.
        data: Folder of images, one folder for each class: the accuracy of each model on each backend is measured there.
        progress: Told what is being measured, and how far it is.
        on_result: Given each result as soon as it is there; after Ctrl-C those of the unfinished measurement, too.

    Returns:
        A result for each setting (backend, threads, streams), batch size and model, in that order.

    Raises:
        UsageError: Nothing to measure, or a model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: A backend cannot run here, or not on the device asked for, or memory ran out.
        DataError: `data` holds no images of the model's classes, or a broken one.
        KeyboardInterrupt: Ctrl-C.
    """
    check_limits(min_seconds, min_runs, warmup_seconds)
    settings = plan(
        models,
        [backend] if isinstance(backend, str) else backend,
        device,
        [threads] if threads is None or isinstance(threads, int) else threads,
        [streams] if isinstance(streams, int) else streams,
        None if batches is None else list(batches),
        memory_limit=memory_limit,
        cuda_graph=cuda_graph,
    )
    course = _Course(
        limits={"min_seconds": min_seconds, "min_runs": min_runs, "warmup_seconds": warmup_seconds},
        ways=(True, False) if transfers is None else (transfers,),
        seed=seed,
        shape=shape,
        resident_before=machine.resident_bytes(),
    )
    results = []
    for setting in settings:
        told = _told(progress, setting if len(settings) > 1 else None)
        with ExitStack() as stack:
            device_before = device_in_use(setting)
            loaded = load_all(models, setting, stack, batches, told)
            sizes = batch_sizes(loaded, batches)
            right = {one.key: folder_top1(one.backend, one.card, data, told) for one in loaded} if data else {}
            for batch in sizes:
                for result in course.run(setting, loaded, batch, device_before, right, told):
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
    return results


@dataclass(frozen=True)
class _Course:
    """How each setting and batch size is measured."""

    limits: Mapping[str, Any]
    ways: tuple[bool, ...]
    """With transfers, without, or both."""
    seed: int
    shape: Sequence[int] | None
    resident_before: int | None
    """Memory of this process before any model was loaded."""

    def run(
        self,
        setting: Setting,
        loaded: Sequence[Loaded],
        batch: int,
        device_before: int | None,
        right: Mapping[str, tuple[float, int]],
        progress: Progress,
    ) -> Iterator[Result]:
        """Measure models by turns, and give a result for each; then pass on the Ctrl-C that came meanwhile."""
        subjects: dict[str, Subject] = {}
        for one in loaded:
            x = random_input(one.backend, one.card, batch, self.seed, self.shape)
            subjects |= {_name(one.key, way): Subject(one.backends, x, way) for way in self.ways}
        machine.reset_peak()
        stopped: KeyboardInterrupt | None = None
        pace = _pace(setting, loaded[0].backend.device)
        try:
            found = measure_subjects(subjects, pace=pace, progress=progress, **self.limits)
        except MeasurementInterrupted as stop:
            found, stopped = stop.timings, stop
        finally:
            if pace is not None:
                pace.close()
        peak, device_after = machine.resident_peak_bytes(), device_in_use(setting)
        for one in loaded:
            timings = [found[name] for way in self.ways if (name := _name(one.key, way)) in found]
            if timings:
                facts = {
                    "resident_peak_bytes": peak,
                    "resident_growth_bytes": _less(peak, self.resident_before),
                    "device_growth_bytes": _less(device_after, device_before),
                }
                yield _result(one, setting, timings, right.get(one.key), **facts)
        if stopped is not None:
            raise stopped


def _pace(setting: Setting, device: str) -> Pace | None:
    """Of the cores that a setting uses; what a GPU does is not seen on them."""
    if device != "cpu":
        return None
    return Pace((setting.threads or cores()) * setting.streams)


def _name(key: str, transfers: bool) -> str:
    return key if transfers else f"{key}, device only"


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _told(progress: Progress | None, setting: Setting | None) -> Progress:
    def tell(name: str, share: float) -> None:
        if progress is not None:
            progress(name if setting is None else f"{setting}: {name}", share)

    return tell


def _result(
    one: Loaded, setting: Setting, timings: Sequence[Timing], right: tuple[float, int] | None, **held: Any
) -> Result:
    card, backend = one.card, one.backend
    accuracy = None if card is None else card.metrics.get("accuracy")
    images = None
    if right is not None:
        accuracy, images = right
    return Result.from_timing(
        timings[0],
        device_only=timings[1] if len(timings) > 1 else None,
        model=one.name,
        part=None if card is None else card.part,
        fusion=None if card is None else card.fusion,
        backend=backend.name,
        device=backend.device,
        threads=setting.threads,
        precision=backend.precision,
        accuracy=float(accuracy) if isinstance(accuracy, int | float) else None,
        accuracy_images=images,
        parameters=None if card is None else card.parameters or None,  # a card without the number has 0
        macs=None if card is None else card.macs or None,
        cuda_graph=backend.cuda_graph,
        memory_limit_bytes=setting.memory_limit,
        load_seconds=one.load_seconds,
        build_seconds=one.build_seconds,
        engine_kept=one.engine_kept,
        file_bytes=one.file.stat().st_size,
        file_sha256=one.sha256,
        resident_load_bytes=one.resident_load_bytes,
        **held,
    )

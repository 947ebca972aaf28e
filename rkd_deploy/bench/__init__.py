"""Measures models against one another, by turns: latency, throughput, memory, accuracy.

`timing` takes the samples, `loading` what is timed, `accuracy` and `parity` say whether it is right, `records` writes
everything down. Nothing here draws or prints: `report` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import machine
from rkd_deploy.bench.accuracy import Accuracy, card_accuracy, folder_top1
from rkd_deploy.bench.loading import Loaded, device_in_use, load_all, random_input, resolve_batches
from rkd_deploy.bench.machine import cores
from rkd_deploy.bench.pace import Pace
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.settings import BenchSettings, PathLike, check_models
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.bench.timing import MeasurementInterrupted, Progress, Workload, measure_workloads

__all__ = ["BenchSettings", "Result", "RunOn", "Timing", "bench", "random_input"]


def bench(
    models: Sequence[PathLike],
    settings: BenchSettings | None = None,
    *,
    progress: Progress | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Time models against one another, by turns, at each batch size, on seeded random inputs.

    Args:
        models: Bundle folders, ONNX files or engines, with or without a card.
        settings: Where, at which batch sizes, for how long. Default: those of `BenchSettings`.
        progress: Called with what is being measured, and the share of it that is done.
        on_result: Called with each result as soon as it is there; after Ctrl-C with those of the unfinished
            measurement, too.

    Returns:
        A result for each place to run, batch size and model, in that order.

    Raises:
        UsageError: Nothing to measure, or a model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: A backend cannot run here, or not on the device asked for, or memory ran out.
        DataError: `settings.data` holds no images of the model's classes, or a broken one.
        KeyboardInterrupt: Ctrl-C.
    """
    settings = settings or BenchSettings()
    check_models(models, settings.run_on)
    # Read before any model is loaded: what they add to it is theirs.
    schedule = _Schedule(settings, machine.resident_bytes())
    results = []
    for run_on in settings.run_on:
        report = _prefixed(progress, run_on if len(settings.run_on) > 1 else None)
        with ExitStack() as stack:
            # Anew at each place: the models of the one before have been let go of by now, but for what their runtime
            # keeps.
            device_before = device_in_use(run_on)
            loaded = load_all(models, run_on, stack, settings.batches, report)
            sizes, accuracies = resolve_batches(loaded, settings.batches), {}
            if settings.data is not None:
                accuracies = {
                    model.key: folder_top1(model.backend, model.card, settings.data, report) for model in loaded
                }
            for batch in sizes:
                for result in schedule.run(run_on, loaded, batch, device_before, accuracies, report):
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
    return results


@dataclass(frozen=True)
class _Schedule:
    """Measures the models at one place and batch size after the other, all in the same way."""

    settings: BenchSettings
    resident_before: int | None
    """Resident memory of this process in bytes before any model was loaded."""

    @property
    def modes(self) -> tuple[bool, ...]:
        """Values of `transfers` to measure with: True is host to host, False device-resident."""
        return (True, False) if self.settings.transfers is None else (self.settings.transfers,)

    def run(
        self,
        run_on: RunOn,
        loaded: Sequence[Loaded],
        batch: int,
        device_before: int | None,
        accuracies: Mapping[str, Accuracy],
        progress: Progress,
    ) -> Iterator[Result]:
        """Measure models by turns, and give a result for each; then raise the Ctrl-C that came meanwhile."""
        settings = self.settings
        workloads: dict[str, Workload] = {}
        for model in loaded:
            x = random_input(model.backend, model.card, batch, settings.seed, settings.shape)
            workloads |= {_name(model.key, mode): Workload(model.backends, x, mode) for mode in self.modes}
        machine.reset_peak()
        stopped: KeyboardInterrupt | None = None
        pace = _pace(run_on, loaded[0].backend.device)
        try:
            timings = measure_workloads(workloads, settings.limits, pace=pace, progress=progress)
        except MeasurementInterrupted as stop:
            timings, stopped = stop.timings, stop
        finally:
            if pace is not None:
                pace.close()
        peak, device_after = machine.resident_peak_bytes(), device_in_use(run_on)
        for model in loaded:
            measured = [timings[name] for mode in self.modes if (name := _name(model.key, mode)) in timings]
            if measured:
                facts = {
                    # The same for every model: they are loaded together, and nothing tells whose a page is.
                    "resident_peak_bytes": peak,
                    "resident_growth_bytes": _less(peak, self.resident_before),
                    "device_growth_bytes": _less(device_after, device_before),
                }
                yield _result(model, run_on, measured, accuracies.get(model.key), **facts)
        if stopped is not None:
            raise stopped


def _pace(run_on: RunOn, device: str) -> Pace | None:
    """A pace on as many threads as a model runs on; None on a GPU, whose pace cannot be seen on CPU cores."""
    if device != "cpu":
        return None
    return Pace((run_on.threads or cores()) * run_on.streams)


def _name(key: str, transfers: bool) -> str:
    return key if transfers else f"{key}, device only"


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _prefixed(progress: Progress | None, run_on: RunOn | None) -> Progress:
    def report(name: str, share: float) -> None:
        if progress is not None:
            progress(name if run_on is None else f"{run_on}: {name}", share)

    return report


def _result(model: Loaded, run_on: RunOn, timings: Sequence[Timing], measured: Accuracy | None, **facts: Any) -> Result:
    card, backend = model.card, model.backend
    graph = None if card is None else card.graph
    accuracy = measured or card_accuracy(card, model.file, model.sha256)
    return Result.from_timing(
        timings[0],
        device_only=timings[1] if len(timings) > 1 else None,
        model=model.name,
        part=None if card is None else card.part,
        fusion=None if card is None else card.fusion,
        backend=backend.name,
        device=backend.device,
        threads=run_on.threads,
        precision=backend.precision,
        accuracy=None if accuracy is None else accuracy.top1,
        accuracy_images=None if accuracy is None else accuracy.images,
        accuracy_source=None if accuracy is None else accuracy.source,
        parameters=None if card is None else card.parameters or None,  # a card without the number has 0
        macs=None if card is None else card.macs or None,
        graph_macs=None if graph is None else graph.macs,
        graph_weights=None if graph is None else graph.weights,
        graph_zeros=None if graph is None else graph.zeros,
        cuda_graph=backend.info.cuda_graph,
        memory_limit_bytes=run_on.memory_limit,
        load_seconds=model.load_seconds,
        build_seconds=model.build_seconds,
        engine_kept=model.engine_kept,
        file_bytes=model.file.stat().st_size,
        file_sha256=model.sha256,
        resident_load_bytes=model.resident_load_bytes,
        **facts,
    )

"""Runs a bench and writes its record, bench.json, whole or as far as the bench came."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rkd_deploy.bench import bench
from rkd_deploy.bench.loadgen import ScenarioResult, run_scenarios
from rkd_deploy.bench.machine import MachineState, machine_state, provenance
from rkd_deploy.bench.mlperf import Load, check_scenarios
from rkd_deploy.bench.results import Result, to_bench_record
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import InterruptedBench, RkdError
from rkd_deploy.signals import handling
from rkd_deploy.storage import write_json

RECORD_NAME = "bench.json"


@dataclass(frozen=True)
class Recorded:
    """A bench whose record was written.

    Attributes:
        path: bench.json, with every sample.
        results: Results in the order they were measured.
        scenarios: Results of LoadGen's scenarios.
        error: What ended the bench early; the record is marked as partial then. None: everything was measured.
    """

    path: Path
    results: list[Result]
    scenarios: list[ScenarioResult]
    error: RkdError | None = None


def record_bench(
    models: Sequence[str | os.PathLike[str]],
    settings: BenchSettings,
    folder: Path,
    progress: Progress | None = None,
    *,
    scenarios: Sequence[str] = (),
    load: Load | None = None,
    analyse: Callable[[Sequence[Result]], Mapping[str, Any]] | None = None,
) -> Recorded:
    """Run `bench`, then LoadGen's scenarios, and write both into bench.json, as far as they came.

    An error after the first result does not lose what was measured: the record is written, marked as partial, and the
    error is returned in `Recorded.error`, for the caller to raise once the results are shown.

    Args:
        models: As for `bench`.
        settings: As for `bench`.
        folder: Where bench.json is written; made when it is not there.
        progress: As for `bench`.
        scenarios: Some of `mlperf.SCENARIOS`; each is run on every model, backend and thread count.
        load: How hard and how long LoadGen asks.
        analyse: Called with the results when all is measured; gives what else belongs into the record.

    Raises:
        RkdError: As `bench` raises it, before anything was measured; nothing is written.
        KeyboardInterrupt: Ctrl-C or SIGTERM before anything was measured; nothing is written.
        StorageError: The record could not be written.
    """
    if scenarios:
        check_scenarios(scenarios)
    results: list[Result] = []
    reported: list[ScenarioResult] = []
    more: dict[str, Any] = {}
    before = machine_state()

    def write(error: RkdError | None = None) -> Recorded:
        states = before, machine_state()
        settings_record, partial = settings.to_record(), error is not None
        path = write_record(results, settings_record, folder, states, reported, more=more, partial=partial)
        return Recorded(path, results, reported, error)

    def measure() -> None:
        nonlocal more
        bench(models, settings, progress=progress, on_result=results.append)
        if scenarios:
            run_scenarios(
                models,
                dict.fromkeys(replace(place, streams=1) for place in settings.run_on),
                scenarios,
                folder,
                load=load or Load(),
                shape=settings.shape,
                progress=progress,
                on_result=reported.append,
            )
        if analyse is not None:
            more |= analyse(results)

    try:
        # What stops a service, a container or a batch job is SIGTERM: it does what Ctrl-C does, also its exit code.
        with handling(signal.default_int_handler, [signal.SIGTERM]):
            measure()
    except (KeyboardInterrupt, RkdError) as error:
        if not results:
            raise
        saved = (
            f"{len(results) + len(reported)} results measured before are in {folder / RECORD_NAME}, marked as partial."
        )
        if isinstance(error, KeyboardInterrupt):
            return write(InterruptedBench(f"Interrupted. The {saved} Run the command again for the rest."))
        error.add_note(saved)
        return write(error)
    return write()


def write_record(
    results: Sequence[Result],
    settings: Mapping[str, Any],
    folder: Path,
    states: tuple[MachineState, MachineState] | None = None,
    scenarios: Sequence[ScenarioResult] = (),
    *,
    more: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Path:
    """Write bench.json into a folder; the record of an earlier bench there is replaced.

    Args:
        results: What `bench` gave.
        settings: How it was measured.
        folder: Folder of the record; made when it is not there.
        states: The machine before the first and after the last measurement.
        scenarios: What LoadGen reported.
        more: What else belongs into the record: "roofline" and "layers".
        partial: Whether less was measured than was asked for.

    Raises:
        StorageError: The record could not be written; the earlier one is intact.
    """
    content = to_bench_record(results, provenance(), settings, states, partial=partial)
    path = folder / RECORD_NAME
    write_json(path, {**content, "loadgen": [asdict(scenario) for scenario in scenarios], **(more or {})})
    return path

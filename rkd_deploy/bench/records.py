"""A bench on disk: the record for machines, the table and the plot for people."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rkd_deploy.bench import bench
from rkd_deploy.bench.loadgen import Load, ScenarioResult, check_scenarios, run_scenarios
from rkd_deploy.bench.machine import conditions, describe
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import InterruptedBench, RkdError
from rkd_deploy.report.writing import Report, write_report
from rkd_deploy.signals import handling

_NOTICED = 1.1
"""Times as slow: a quiet machine's own turbo stays below that."""


@dataclass(frozen=True)
class Recorded:
    """A bench that is over: what it found, in which state of the machine, and where it was written."""

    results: list[Result]
    scenarios: list[ScenarioResult]
    report: Report
    conditions: list[str]
    """The machine before and after, as lines for people."""


def _disturbed(results: Sequence[Result]) -> list[str]:
    """A line, if the machine was clearly slower than it can be while something was measured."""
    slowest = max((result.slowdown for result in results), default=1.0)
    if slowest < _NOTICED:
        return []
    return [
        f"This machine was up to {slowest:.2f} times slower than it can be: others were on its cores. The low ends of "
        "the intervals allow for that; to tell two models apart, use bench-compare."
    ]


def record_bench(
    models: Sequence[str | os.PathLike[str]],
    settings: BenchSettings,
    folder: Path,
    progress: Progress | None = None,
    *,
    scenarios: Sequence[str] = (),
    load: Load | None = None,
    study: Callable[[Sequence[Result]], Mapping[str, Any]] | None = None,
) -> Recorded:
    """Run `bench`, then LoadGen's scenarios, and write both down, as far as they came.

    Args:
        models: As for `bench`.
        settings: As for `bench`.
        folder: As for `write_report`.
        progress: As for `bench`.
        scenarios: Of `loadgen.SCENARIOS`; each is run on every model, backend and thread count.
        load: How hard and how long LoadGen asks.
        study: Called with the results when all is measured; gives what else belongs into the record.

    Raises:
        InterruptedBench: Ctrl-C or SIGTERM; what was measured by then is written, marked as partial.
        RkdError: As `bench` and `run_scenarios` raise it, with what was measured before written in the same way.
        KeyboardInterrupt: One of them before anything was measured; nothing is written.
    """
    check_scenarios(scenarios)
    results: list[Result] = []
    told: list[ScenarioResult] = []
    more: dict[str, Any] = {}
    before = conditions()

    def write(partial: bool) -> Recorded:
        states = {"before": before, "after": conditions()}
        report = write_report(results, settings.to_record(), folder, states, told, more=more, partial=partial)
        return Recorded(results, told, report, [*describe(**states), *_disturbed(results)])

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
                on_result=told.append,
            )
        if study is not None:
            more |= study(results)

    try:
        # What stops a service, a container or a batch job is SIGTERM: it does what Ctrl-C does, also its exit code.
        with handling(signal.default_int_handler, [signal.SIGTERM]):
            measure()
    except (KeyboardInterrupt, RkdError) as error:
        if not results:
            raise
        count = len(results) + len(told)
        kept = f"{count} results measured before are in {write(partial=True).report.record}, marked as partial."
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedBench(f"Interrupted. The {kept} Run the command again for the rest.") from None
        error.add_note(kept)
        raise
    return write(partial=False)

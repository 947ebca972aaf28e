"""Runs MLPerf Inference's four scenarios on every model of a bench: "LoadGen, unofficial".

It stays unofficial whatever LoadGen says: runs are shorter than the 600 s that MLPerf asks for, inputs are noise, and
nobody reviews it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.backends import RunOn
from rkd_deploy.bench.loading import Loaded, load_all
from rkd_deploy.bench.mlperf import Load, check_scenarios, library, run_scenario
from rkd_deploy.bench.timing import Progress

LABEL = "LoadGen, unofficial"


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """LoadGen's figures of a model in a scenario; durations in ms, None where the scenario has no such figure."""

    label: str = LABEL
    model: str
    backend: str
    device: str
    threads: int | None
    scenario: str
    valid: bool
    """Whether LoadGen calls the run valid, by its rules for this run's shorter duration."""
    reason: str | None
    """Why the run is not valid, in LoadGen's words; None where it is."""
    queries: int
    samples_per_s: float
    """Images per second: in scenario Server those completed, else all images over the time."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    target_qps: float | None
    target_latency_ms: float | None
    logs: str
    """Name of the folder with LoadGen's logs, in the report's folder."""


def run_scenarios(
    models: Sequence[str | os.PathLike[str]],
    run_on: Iterable[RunOn],
    scenarios: Sequence[str],
    folder: Path,
    *,
    load: Load,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    progress: Progress | None = None,
    on_result: Callable[[ScenarioResult], None] | None = None,
) -> list[ScenarioResult]:
    """Run every scenario on every model at every place, one after the other.

    Args:
        models: As for `bench`.
        run_on: Where, one after the other, each with one stream: LoadGen's queries are its own.
        scenarios: Some of `SCENARIOS`.
        folder: Where the logs go, a folder for each run.
        load: How hard and how long.
        seed: Seed of the inputs.
        shape: As for `bench`.
        progress: Called with the scenario that is run, and the share of them that is done.
        on_result: Called with each result as soon as it is there.

    Raises:
        RkdError: As `bench` raises it, and `check_scenarios`.
    """
    check_scenarios(scenarios)
    results = []
    for place in run_on:
        with ExitStack() as stack:
            for model in load_all(models, place, stack, progress=progress):
                for number, scenario in enumerate(scenarios):
                    if progress is not None:
                        progress(f"{place}: {model.key}, LoadGen {scenario}", number / len(scenarios))
                    words = f"loadgen {scenario} {place.backend} {place.threads or ''} {model.key}"
                    logs = re.sub(r"[^\w.+]+", "-", words)
                    inputs = library(model.backend, model.card, seed, shape)
                    facts = run_scenario(model.backend, inputs, scenario, folder / logs, load)
                    results.append(_result(model, place, scenario, logs, facts))
                    if on_result is not None:
                        on_result(results[-1])
    return results


def _result(model: Loaded, run_on: RunOn, scenario: str, logs: str, facts: Mapping[str, Any]) -> ScenarioResult:
    return ScenarioResult(
        model=model.name,
        backend=model.backend.name,
        device=model.backend.device,
        threads=run_on.threads,
        scenario=scenario,
        logs=logs,
        **facts,
    )

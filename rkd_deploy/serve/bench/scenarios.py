"""LoadGen's scenarios over the models and settings of a bench, and how they are reported: "LoadGen, unofficial"."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.serve.bench import tabular
from rkd_deploy.serve.bench.loadgen import Load, check_scenarios, library, run_scenario
from rkd_deploy.serve.bench.loading import Loaded, Setting, load_all
from rkd_deploy.serve.bench.tabular import Column, milliseconds
from rkd_deploy.serve.bench.timing import Progress

if TYPE_CHECKING:
    from rich.console import Console

LABEL = "LoadGen, unofficial"


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """What LoadGen said of one model in one scenario; durations in ms, None where the scenario has no such figure."""

    label: str = LABEL
    model: str
    backend: str
    device: str
    threads: int | None
    scenario: str
    valid: bool
    """LoadGen's own verdict, by its rules for this run's shorter duration."""
    reason: str | None
    """Why it is not valid, in LoadGen's words."""
    queries: int
    samples_per_s: float
    """Of Server: completed; of the others: images over time."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    target_qps: float | None
    target_latency_ms: float | None
    logs: str
    """LoadGen's own logs, a folder in the report's folder."""


def run_scenarios(
    models: Sequence[str | os.PathLike[str]],
    settings: Sequence[Setting],
    scenarios: Sequence[str],
    folder: Path,
    *,
    load: Load,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    progress: Progress | None = None,
    on_result: Callable[[ScenarioResult], None] | None = None,
) -> list[ScenarioResult]:
    """Run every scenario on every model and setting, one after the other.

    Args:
        models: As for `bench`.
        settings: Backends and thread counts; LoadGen knows its own streams, so that settings differ in no others.
        scenarios: Of `SCENARIOS`.
        folder: Where the logs go, a folder for each run.
        load: How hard and how long.
        seed: Of the inputs.
        shape: As for `bench`.
        progress: Told what is being run.
        on_result: Given each result as soon as it is there.

    Raises:
        RkdError: As `bench` raises it, and `check_scenarios`.
    """
    check_scenarios(scenarios)
    results = []
    for setting in settings:
        with ExitStack() as stack:
            for one in load_all(models, setting, stack, progress=progress):
                for number, scenario in enumerate(scenarios):
                    if progress is not None:
                        progress(f"{setting}: {one.key}, LoadGen {scenario}", number / len(scenarios))
                    words = f"loadgen {scenario} {setting.backend} {setting.threads or ''} {one.key}"
                    logs = re.sub(r"[^\w.+]+", "-", words)
                    inputs = library(one.backend, one.card, seed, shape)
                    facts = run_scenario(one.backend, inputs, scenario, folder / logs, load)
                    results.append(_result(one, setting, scenario, logs, facts))
                    if on_result is not None:
                        on_result(results[-1])
    return results


def _result(one: Loaded, setting: Setting, scenario: str, logs: str, facts: Mapping[str, Any]) -> ScenarioResult:
    return ScenarioResult(
        model=one.name,
        backend=one.backend.name,
        device=one.backend.device,
        threads=setting.threads,
        scenario=scenario,
        logs=logs,
        **facts,
    )


_COLUMNS: tuple[Column[ScenarioResult], ...] = (
    Column(LABEL, lambda r: r.scenario, numeric=False),
    Column("Model", lambda r: r.model, numeric=False),
    Column("Backend", lambda r: f"{r.backend} {r.device}", numeric=False, setting=True),
    Column("Threads", lambda r: None if r.threads is None else str(r.threads), setting=True),
    Column("p50, ms", lambda r: milliseconds(r.p50_ms)),
    Column("p90, ms", lambda r: milliseconds(r.p90_ms)),
    Column("p99, ms", lambda r: milliseconds(r.p99_ms)),
    Column("Images/s", lambda r: f"{r.samples_per_s:,.0f}"),
    Column("Asked for, /s", lambda r: None if r.target_qps is None else f"{r.target_qps:,.0f}"),
    Column("Bound, ms", lambda r: None if r.target_latency_ms is None else milliseconds(r.target_latency_ms)),
    Column("Queries", lambda r: f"{r.queries:,}"),
    Column("LoadGen says", lambda r: "valid" if r.valid else f"invalid: {r.reason or 'early stopping'}", numeric=False),
)


def scenarios_markdown(results: Sequence[ScenarioResult]) -> str:
    """A Markdown table under the words that say what it is not."""
    return (
        f"{LABEL}: shorter than MLPerf's 600 s, on noise, reviewed by nobody.\n\n{tabular.markdown(_COLUMNS, results)}"
    )


def print_scenarios(results: Sequence[ScenarioResult], console: Console) -> None:
    """The table of `scenarios_markdown` for a terminal."""
    tabular.print_table(_COLUMNS, results, console)

"""Says which columns the tables have: results, percentiles, roofline, ratios, scenarios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rkd_deploy.bench.compare import Ratio
from rkd_deploy.bench.loadgen import LABEL, ScenarioResult
from rkd_deploy.bench.reading import BenchRecord
from rkd_deploy.bench.results import PERCENTILES, Figures, Result
from rkd_deploy.bench.roofline import Achieved, LatencyBound, achieved
from rkd_deploy.report.conditions import condition_lines, pace_lines
from rkd_deploy.report.tables import Column, milliseconds, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console


_SETTINGS: tuple[Column[Result], ...] = (
    Column("Model", lambda r: r.model, numeric=False),
    Column("Part", lambda r: r.part, numeric=False, detail=True),
    Column("Fusion", lambda r: None if r.fusion in (None, "none") else r.fusion, numeric=False, detail=True),
    Column("Backend", lambda r: f"{r.backend} {r.device}", numeric=False, setting=True),
    Column("Precision", lambda r: None if r.precision == "unknown" else r.precision, numeric=False, setting=True),
    Column("Threads", lambda r: None if r.threads is None else str(r.threads), setting=True),
    Column("Streams", lambda r: None if r.streams == 1 else str(r.streams), setting=True),
    Column("Batch", lambda r: str(r.batch), setting=True),
)

_SAME = 0.02
"""Share by which the graph's numbers may differ from the trained ones and count as the same: a norm is folded."""


def graph_macs(trained: int | None, stored: int | None) -> str | None:
    """MACs of one image in the exported graph, in millions; None where they are those of the trained network."""
    if trained is None or stored is None or abs(stored - trained) <= _SAME * trained:
        return None
    return f"{stored / 1e6:,.2f}"


def graph_weights(trained: int | None, stored: int | None, zeros: int | None) -> str | None:
    """Numbers that the exported graph stores, in millions, and how many of them are zero; None where none are extra."""
    if trained is None or stored is None or zeros is None or stored <= (1 + _SAME) * trained:
        return None
    return f"{stored / 1e6:,.3f} ({zeros / stored:.0%})"


RESULT_COLUMNS: tuple[Column[Result], ...] = (
    *_SETTINGS,
    Column("p50, ms", lambda r: milliseconds(r.p50_ms)),
    Column("its 95 % CI, ms", lambda r: _interval(r, 50), detail=True),
    Column("p90, ms", lambda r: _latency(r, 90)),
    Column("p99, ms", lambda r: _latency(r, 99), detail=True),
    Column("Device only p50, ms", lambda r: None if r.device_only is None else milliseconds(r.device_only.p50_ms)),
    Column("Images/s", lambda r: f"{r.throughput_per_s:,.0f}"),
    Column("Top-1, %", lambda r: None if r.accuracy is None else f"{r.accuracy:.2f}"),
    Column("of images", lambda r: None if r.accuracy_images is None else f"{r.accuracy_images:,}"),
    Column("MACs, M", lambda r: None if r.macs is None else f"{r.macs / 1e6:,.1f}"),
    Column("Params, M", lambda r: None if r.parameters is None else f"{r.parameters / 1e6:,.3f}"),
    Column("Graph's MACs, M", lambda r: graph_macs(r.macs, r.graph_macs)),
    Column("Graph's weights, M (zeros)", lambda r: graph_weights(r.parameters, r.graph_weights, r.graph_zeros)),
    Column("Engine build, s", lambda r: None if r.build_seconds is None else f"{r.build_seconds:,.1f}"),
    Column("File, MB", lambda r: f"{r.file_bytes / 1e6:,.2f}"),
    Column("Ended", lambda r: "interrupted" if cut_short(r) else None, numeric=False),
)


SHORT_COLUMNS: tuple[Column[Result], ...] = (
    Column("Model", lambda r: r.model, numeric=False),
    Column("Backend", lambda r: r.backend if r.device == "cpu" else f"{r.backend} {r.device}", numeric=False),
    Column("Threads", lambda r: None if r.threads is None else str(r.threads), setting=True),
    Column("Streams", lambda r: None if r.streams == 1 else str(r.streams), setting=True),
    Column("Batch", lambda r: str(r.batch)),
    Column("p50, ms", lambda r: milliseconds(r.p50_ms)),
    Column("p99, ms", lambda r: _latency(r, 99)),
    Column("Images/s", lambda r: f"{r.throughput_per_s:,.0f}"),
    Column("Top-1, %", lambda r: None if r.accuracy is None else f"{r.accuracy:.2f}"),
    Column("Ended", lambda r: "interrupted" if cut_short(r) else None, numeric=False),
)
"""Columns that fit any terminal; `RESULT_COLUMNS` and the tables of details have the rest."""


def cut_short(result: Result) -> bool:
    """Whether either kind of its figures was interrupted."""
    return not all(figures.complete for figures in (result, result.device_only) if figures is not None)


@dataclass(frozen=True)
class FiguresRow:
    """One line of the tables of details: figures, host to host or device only, and the result they belong to."""

    result: Result
    figures: Figures


def _of_result(column: Column[Result]) -> Column[FiguresRow]:
    return Column(column.title, lambda row: column.text(row.result), numeric=column.numeric, setting=column.setting)


_WHOSE: tuple[Column[FiguresRow], ...] = (
    *(_of_result(column) for column in _SETTINGS if not column.detail),
    Column("Figures", lambda r: "end to end" if r.figures.transfers else "device only", numeric=False),
)


def _percentiles() -> Iterator[Column[FiguresRow]]:
    """Each with its interval: the median's says whether two benches differ, so any terminal has room for that one."""
    for q in PERCENTILES:
        yield Column(f"p{q:g}, ms", partial(_percentile, q))
        yield Column("its 95 % CI, ms", partial(_percentile_interval, q), detail=q != 50)


def _percentile(q: float, row: FiguresRow) -> str | None:
    return _latency(row.figures, q)


def _percentile_interval(q: float, row: FiguresRow) -> str | None:
    return _interval(row.figures, q)


def _latency(figures: Figures, q: float) -> str | None:
    percentile = figures.percentiles.get(q)
    return None if percentile is None else milliseconds(percentile.ms)


def _interval(figures: Figures, q: float) -> str | None:
    percentile = figures.percentiles.get(q)
    if percentile is None or percentile.low_ms is None or percentile.high_ms is None:
        return None
    return f"{milliseconds(percentile.low_ms)} to {milliseconds(percentile.high_ms)}"


PERCENTILE_COLUMNS: tuple[Column[FiguresRow], ...] = (
    *_WHOSE,
    Column("Mean, ms", lambda r: _figure(r.figures.mean_ms, milliseconds)),
    Column("CV, %", lambda r: _figure(r.figures.cv, lambda cv: f"{100 * cv:.1f}")),
    *_percentiles(),
    Column("Ended", lambda r: None if r.figures.complete else "interrupted", numeric=False),
)
RUN_COLUMNS: tuple[Column[FiguresRow], ...] = (
    *_WHOSE,
    Column("Load, s", lambda r: None if r.result.load_seconds is None else f"{r.result.load_seconds:.3f}"),
    Column("First run, ms", lambda r: _figure(r.figures.first_run_ms, milliseconds)),
    Column("Warm-up runs", lambda r: _figure(r.figures.warmup_runs, "{:,}".format)),
    Column("Runs", lambda r: _figure(r.figures.runs, "{:,}".format)),
    Column("Machine's pace, ms", lambda r: _figure(r.figures.pace_ms, milliseconds)),
    Column("Engine", lambda r: _engine(r.result), numeric=False),
    Column("CUDA graph", lambda r: None if r.result.cuda_graph is None else ("on" if r.result.cuda_graph else "off")),
    Column("Memory limit, MB", lambda r: _megabytes(r.result.memory_limit_bytes)),
    Column("Resident peak, MB", lambda r: _megabytes(r.result.resident_peak_bytes)),
    Column("grown by, MB", lambda r: _megabytes(r.result.resident_growth_bytes)),
    Column("Device grown by, MB", lambda r: _megabytes(r.result.device_growth_bytes)),
)


def print_results(results: Sequence[Result], console: Console) -> None:
    """Print one short table, a line for each result."""
    print_table(SHORT_COLUMNS, with_names(results), console)


def print_bench(record: BenchRecord, console: Console, *, details: bool = False) -> None:
    """Print the results of a record, and whatever else was asked for when it was made.

    Args:
        record: From `read_bench`.
        console: Where to.
        details: Print all that is known of the results, and the state that the machine was in.
    """
    print_results(record.results, console)
    if details:
        results = with_names(record.results)
        print_table(RESULT_COLUMNS, results, console)
        print_table(PERCENTILE_COLUMNS, rows_of(results), console)
        print_table(RUN_COLUMNS, rows_of(results), console)
    if record.scenarios:
        print_table(SCENARIO_COLUMNS, record.scenarios, console)
    if record.roofline.predictions:
        print_roofline(record.roofline.predictions, record.results, console)
    for line in machine_lines(record) if details else pace_lines(record.results):
        print_line(line, console)


def with_names(results: Sequence[Result]) -> list[Result]:
    """Rename results so that models are told apart which their cards call the same.

    Two bundles of one run have one name in their cards; what differs is added: network, fusion, precision, or the
    beginning of the file's checksum.
    """
    named = {(result.model, result.part, result.fusion, result.precision, result.file_sha256) for result in results}
    models = list(dict.fromkeys(named))
    return [replace(result, model=_name(result, models)) for result in results]


def _name(result: Result, models: Sequence[tuple[str | None, ...]]) -> str:
    name, *facts = result.model, result.part, result.fusion, result.precision, (result.file_sha256 or "")[:8]
    # Facts are added from the most telling on, and only until the name is the only one.
    same_name = [model for model in models if model[0] == name]
    for place, fact in enumerate(facts, start=1):
        if len(same_name) > 1 and len({model[place] for model in same_name}) > 1 and fact:
            name = f"{name}, {fact}"
            same_name = [model for model in same_name if (model[place] or "")[:8] == fact[:8]]
    return name


def machine_lines(record: BenchRecord) -> list[str]:
    """The machine's state before and after a bench, and whether its pace changed meanwhile."""
    states = record.conditions
    lines = [] if states is None else condition_lines(states.before, states.after)
    return [*lines, *pace_lines(record.results)]


def rows_of(results: Sequence[Result]) -> list[FiguresRow]:
    """A row for each kind of figures of each result: host to host, device only."""
    pairs = [(result, figures) for result in results for figures in (result, result.device_only)]
    return [FiguresRow(result, figures) for result, figures in pairs if figures is not None]


def _figure(value: float | None, form: Callable[[Any], str]) -> str | None:
    """A figure as text; None where a record of another version lacks it."""
    return None if value is None else form(value)


def _engine(result: Result) -> str | None:
    if result.engine_kept is None:
        return None
    built = result.build_seconds
    return "from the cache" if built is None else f"built in {built:,.1f} s, and kept"


def _megabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:,.1f}"


def _scaled(value: float | None, unit: float) -> str | None:
    return None if value is None else milliseconds(value / unit)  # three digits, whatever the unit


ROOFLINE_COLUMNS: tuple[Column[Achieved], ...] = (
    Column("Model", lambda a: a.prediction.model, numeric=False),
    Column("Backend", lambda a: f"{a.prediction.backend} {a.prediction.device}", numeric=False, setting=True),
    Column("Threads", lambda a: None if a.prediction.threads is None else str(a.prediction.threads), setting=True),
    Column("Batch", lambda a: str(a.prediction.batch)),
    Column("Arithmetic", lambda a: a.prediction.arithmetic, numeric=False, setting=True),
    Column("MACs of a call, M", lambda a: _scaled(a.prediction.macs, 1e6)),
    Column("Moved at least, MB", lambda a: _scaled(a.prediction.least_bytes, 1e6)),
    Column("Moved unfused, MB", lambda a: _scaled(a.prediction.unfused_bytes, 1e6), detail=True),
    Column("Peak, GMAC/s", lambda a: _scaled(a.prediction.macs_per_s, 1e9), detail=True),
    Column("Memory, GB/s", lambda a: _scaled(a.prediction.bytes_per_s, 1e9), detail=True),
    Column("Limit", lambda a: a.prediction.limit, numeric=False),
    Column("Bound, ms", lambda a: _scaled(a.prediction.bound_ms, 1)),
    Column("p50, ms", lambda a: _scaled(a.p50_ms, 1)),
    Column("Bound / p50, %", lambda a: None if a.share is None else f"{100 * a.share:.1f}"),
)


def print_roofline(predictions: Sequence[LatencyBound], results: Sequence[Result], console: Console) -> None:
    """Print the bounds, before a measurement (no results) or after it, and why a bound is missing."""
    print_line(
        "The bound that was predicted, and the median" if results else "Predicted: no call can be faster than", console
    )
    print_table(ROOFLINE_COLUMNS, achieved(predictions, results), console)
    for note in sorted({f"{prediction.model}: {prediction.note}" for prediction in predictions if prediction.note}):
        print_line(note, console, style="yellow")


_RATIO_COLUMNS: tuple[Column[Ratio], ...] = (
    Column("A", lambda r: r.a, numeric=False, setting=True),
    Column("B", lambda r: r.b, numeric=False, setting=True),
    Column("Backend", lambda r: f"{r.backend} {r.device}", numeric=False, setting=True),
    Column("Threads", lambda r: None if r.threads is None else str(r.threads), setting=True),
    Column("Batch", lambda r: str(r.batch)),
    Column("B / A", lambda r: f"{r.ratio:.3f}"),
    Column("95 % CI", lambda r: f"{r.low:.3f} to {r.high:.3f}"),
    Column("B is", lambda r: r.verdict, numeric=False),
    Column("Of", lambda r: f"{r.count} {r.unit}", numeric=False, detail=True),
)


def print_ratios(ratios: Sequence[Ratio], console: Console) -> None:
    """Print a table of ratios, a line for each condition."""
    print_table(_RATIO_COLUMNS, ratios, console)


SCENARIO_COLUMNS: tuple[Column[ScenarioResult], ...] = (
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


def print_exits(report: Mapping[str, Any], console: Console) -> None:
    """The table of a card's `early_exit`: what each threshold saves and costs."""
    from rich.table import Table

    table = Table(title=f"Early exit at {report['threshold']:g} ({report['chosen_on']})")
    for title in ("images", "threshold", "leave after S, A_1, .., %", "mean MACs, M", "saved, %", "Top-1, %"):
        table.add_column(title, justify="right")
    for name in ("held_out", "test"):
        for row in report.get(name, ()):
            shares = " ".join(f"{100 * share:.1f}" for share in row["shares"])
            cells = (shares, f"{row['macs'] / 1e6:.3f}", f"{100 * row['saved']:.1f}", f"{row['top1']:.2f}")
            table.add_row(name.replace("_", "-"), f"{row['threshold']:g}", *cells)
    console.print(table)

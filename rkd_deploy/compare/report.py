"""A comparison for machines (JSON) and people (terminal, Markdown)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.bench.machine import provenance
from rkd_deploy.bench.reading import BenchRecord, bench_record, damaged, read_record
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.compare.exits import EXIT_COLUMNS, ExitCurve
from rkd_deploy.compare.rows import Comparison, NetworkRow
from rkd_deploy.decoding import DecodingError, decode
from rkd_deploy.errors import MissingDependencyError
from rkd_deploy.report import tables
from rkd_deploy.report.columns import graph_macs, graph_weights
from rkd_deploy.report.page import Pages, Picture, Section, table_of, write_pages
from rkd_deploy.report.sections import sections
from rkd_deploy.report.style import COLOURS, INK, OTHER, QUIET, WIDTH, frame, new_figure, plot_style, short, write_png
from rkd_deploy.report.tables import Column, milliseconds, print_line
from rkd_deploy.report.writing import facts_of
from rkd_deploy.storage import write_json, write_text
from rkd_deploy.text import markdown, visible
from rkd_deploy.train.verdict import CONTROLS, Verdict

if TYPE_CHECKING:
    from rich.console import Console


_Value = Callable[[NetworkRow], float | None]


def write_comparison_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture of a comparison as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file could not be written.
    """
    write_png(comparison_figure(comparison), path)


@plot_style()
def comparison_figure(comparison: Comparison, *, narrow: bool = False) -> Any:
    """The matplotlib Figure of a comparison: for a page that a phone shows too, its panels one below the other."""
    rows = comparison.rows
    values: list[tuple[str, _Value]] = [("MACs of one image, M", lambda row: row.macs / 1e6)]
    if any(row.p50_ms is not None for row in rows):
        values.append(("Median latency, ms", lambda row: row.p50_ms))
    count = 1 + len(values)
    if narrow:
        figure = new_figure(WIDTH, count * (0.6 + 0.28 * len(rows)))
        panels = figure.subplots(count, 1)
    else:
        figure = new_figure(5 + 3 * (count - 1), 1.5 + 0.36 * len(rows))
        panels = figure.subplots(1, count, sharey=True, width_ratios=[2, 1, 1][:count])
        title = f"{comparison.data}, {comparison.test_images:,} test images"
        figure.suptitle(visible(title), x=0.01, ha="left", fontsize=12, color=INK)
    _accuracy(panels[0], rows)
    for axes, (label, value) in zip(panels[1:], values, strict=True):
        _bars(axes, rows, value, label)
    for axes in panels:
        frame(axes, "x")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        if narrow or axes is panels[0]:
            names = [short(row.name, 32) if narrow else visible(row.name) for row in rows]
            axes.set_yticks(range(len(rows)), names, color=INK)
            axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _accuracy(axes: Any, rows: Sequence[NetworkRow]) -> None:
    for place, row in enumerate(rows):
        half = row.standard_error if row.deviation is None else row.deviation
        colour = COLOURS.get(row.part, OTHER)
        axes.errorbar(row.top1, place, xerr=half, fmt="o", markersize=6, capsize=3, elinewidth=1.2, color=colour)
        axes.annotate(
            f"{row.top1:.1f}",
            (row.top1 + half, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=QUIET,
        )
    # Where S0 stands is what every other network is read against.
    for row in rows:
        if row.part == "s0":
            axes.axvline(row.top1, color=COLOURS["s0"], linewidth=0.8, alpha=0.5, linestyle=":", zorder=0)
            break
    axes.margins(x=0.12)
    axes.set_xlabel("Top-1, % (bar: deviation or error)", color=INK)


def _bars(axes: Any, rows: Sequence[NetworkRow], value: _Value, label: str) -> None:
    known = [(place, value(row), COLOURS.get(row.part, OTHER)) for place, row in enumerate(rows)]
    for place, length, colour in known:
        if length is None:
            continue
        axes.barh(place, length, height=0.55, color=colour, alpha=0.85)
        axes.annotate(
            f"{length:.3g}",
            (length, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=QUIET,
        )
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=INK)


COMPARISON_SCHEMA = 1
NOTE = (
    "Top-1 is of the last epoch, on the test images, which nothing was chosen on. +- is the standard deviation over "
    "seeds where there are several, else (in brackets) the standard error that so many test images leave. Against S0: "
    "points above one network of the same cost in the same run. Against S0, same losses: what A adds to the objective. "
    "Against S: what A adds to its own S."
)


def _spread(row: NetworkRow) -> str:
    return f"({row.standard_error:.2f})" if row.deviation is None else f"{row.deviation:.2f}"


def _points(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"


COLUMNS: tuple[Column[NetworkRow], ...] = (
    Column("Network", lambda r: r.name, numeric=False),
    Column("Seeds", lambda r: str(len(r.runs)), setting=True),
    Column("Top-1, %", lambda r: f"{r.top1:.2f}"),
    Column("+-, points", _spread),
    Column("Against S0, points", lambda r: _points(r.over_s0)),
    Column("Against S0, same losses, points", lambda r: _points(r.over_control)),
    Column("Against S, points", lambda r: _points(r.over_student)),
    Column("Held out, last, %", lambda r: None if r.val_last is None else f"{r.val_last:.2f}", detail=True),
    Column("Held out, best, %", lambda r: None if r.val_best is None else f"{r.val_best:.2f}", detail=True),
    Column("MACs, M", lambda r: f"{r.macs / 1e6:,.2f}"),
    Column("Params, M", lambda r: f"{r.parameters / 1e6:,.3f}", detail=True),
    Column("Graph's MACs, M", lambda r: graph_macs(r.macs, r.graph_macs)),
    Column("Graph's weights, M (zeros)", lambda r: graph_weights(r.parameters, r.graph_weights, r.graph_zeros)),
    Column("p50, ms", lambda r: None if r.p50_ms is None else milliseconds(r.p50_ms)),
    Column("p90, ms", lambda r: None if r.p90_ms is None else milliseconds(r.p90_ms), detail=True),
    Column("Training, s", lambda r: None if r.seconds is None else f"{r.seconds:,.0f}", detail=True),
)


@dataclass(frozen=True)
class Files:
    """The files of a comparison: record, table and picture.

    Attributes:
        record: compare.json.
        table: compare.md.
        plot: compare.png, or None where matplotlib is not installed.
    """

    record: Path
    table: Path
    plot: Path | None


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of a comparison, its verdicts, what it means, and what is missing in it."""
    print_line(f"{comparison.data}, {comparison.test_images:,} test images", console)
    tables.print_table(COLUMNS, comparison.rows, console)
    for verdict in comparison.verdicts:
        print_line(verdict.sentence(), console)
    for curve in comparison.exits:
        tables.print_table(EXIT_COLUMNS, curve.points, console)
        print_line(curve.sentence(), console)
    print_line(NOTE, console, style="dim")
    for sentence in comparison.missing:
        print_line(f"Missing: {sentence}", console, style="yellow")


def comparison_markdown(comparison: Comparison) -> str:
    """The table of a comparison and its notes as Markdown."""
    missing = "".join(f"\nMissing: {markdown(sentence)}\n" for sentence in comparison.missing)
    head = f"{markdown(comparison.data)}, {comparison.test_images:,} test images.\n\n"
    verdicts = "".join(f"\n{markdown(verdict.sentence())}\n" for verdict in comparison.verdicts)
    exits = "".join(
        f"\n{markdown(curve.sentence())}\n\n{tables.markdown_table(EXIT_COLUMNS, curve.points)}"
        for curve in comparison.exits
    )
    return head + tables.markdown_table(COLUMNS, comparison.rows) + verdicts + exits + f"\n{NOTE}\n" + missing


def to_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison, with or without latencies, as its record has it; provenance is added where it is written."""
    roofline, layers = comparison.roofline, comparison.layers
    return {
        "schema": COMPARISON_SCHEMA,
        "kind": "compare",
        "data": comparison.data,
        "test_images": comparison.test_images,
        "rows": [asdict(row) for row in comparison.rows],
        "results": [result.to_row() for result in comparison.results],
        **({} if roofline is None else {"roofline": roofline.to_record()}),
        **({} if layers is None else {"layers": [times.to_record() for times in layers]}),
        "verdicts": [{**asdict(verdict), "outcome": verdict.outcome} for verdict in comparison.verdicts],
        **({"early_exit": [asdict(curve) for curve in comparison.exits]} if comparison.exits else {}),
        "missing": list(comparison.missing),
        "settings": _settings_record(comparison.settings),
    }


def _settings_record(settings: BenchSettings | None) -> dict[str, Any]:
    """How latency was measured; empty where it was not."""
    if settings is None:
        return {}
    (place,) = settings.run_on
    return {
        "backend": place.backend,
        "device": place.device,
        "batches": list(settings.batches or (1,)),
        "threads": place.threads,
        "min_seconds": settings.min_seconds,
    }


def write_comparison(comparison: Comparison, folder: Path) -> Files:
    """Write compare.json, compare.md and compare.png into a folder.

    Raises:
        StorageError: A file could not be written; the earlier one is intact.
    """
    record, table = folder / "compare.json", folder / "compare.md"
    write_json(record, {**to_record(comparison), "provenance": asdict(provenance())})
    write_text(table, comparison_markdown(comparison))
    picture: Path | None = folder / "compare.png"
    try:
        write_comparison_plot(comparison, folder / "compare.png")
    except MissingDependencyError:
        picture = None
    return Files(record, table, picture)


@dataclass(frozen=True)
class RecordedComparison:
    """What compare.json holds: the rows, and the bench of their networks."""

    comparison: Comparison
    bench: BenchRecord


def read_comparison(path: Path) -> RecordedComparison:
    """A comparison from its record.

    Raises:
        ModelFileError: The file is no record of a comparison, or a damaged one.
    """
    content = read_record(path)
    try:
        return recorded_comparison(content)
    except DecodingError as error:
        raise damaged(path, error) from error


def recorded_comparison(content: Mapping[str, Any]) -> RecordedComparison:
    """A comparison from the JSON of its record.

    Raises:
        DecodingError: The record is damaged.
    """
    names = ("data", "test_images", "rows", "missing", "verdicts")
    exits = {"exits": content["early_exit"]} if "early_exit" in content else {}
    stored = decode(_Stored, {name: content[name] for name in names if name in content} | exits)
    if not stored.rows:
        raise DecodingError("rows is empty")
    comparison = Comparison(**vars(stored), networks=())
    return RecordedComparison(comparison, bench_record(content))


@dataclass(frozen=True)
class _Stored:
    """The part of a comparison that its record holds."""

    data: str
    test_images: int
    rows: tuple[NetworkRow, ...]
    missing: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    exits: tuple[ExitCurve, ...] = ()


def write_comparison_report(recorded: RecordedComparison, folder: Path) -> Pages:
    """Write compare.html and compare.md of a comparison.

    Args:
        recorded: From `read_comparison`.
        folder: Made when it is not there.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: A file could not be written; the earlier one is intact.
    """
    comparison, bench = recorded.comparison, recorded.bench
    facts = {"Data": comparison.data, "Test images": f"{comparison.test_images:,}", **facts_of([bench])}
    title = f"Comparison of {len(comparison.rows)} networks on {comparison.data}"
    return write_pages(
        title, facts, [_section(comparison), *_exit_section(comparison), *sections([bench])], folder, "compare"
    )


def _section(comparison: Comparison) -> Section:
    best = max(comparison.rows, key=lambda row: row.top1)
    words = f"Most accurate: {best.name}, {best.top1:.2f} % of the test images."
    picture = Picture("Accuracy, cost, latency", words, comparison_figure(comparison, narrow=True))
    table = table_of("Networks", COLUMNS, comparison.rows)
    verdicts = [verdict.sentence() for verdict in comparison.verdicts]
    return Section(
        "Networks", [*verdicts, NOTE, *(f"Missing: {control}" for control in comparison.missing)], [table, picture]
    )


def _exit_section(comparison: Comparison) -> list[Section]:
    if not comparison.exits:
        return []
    words = (
        "S + A at each threshold, from S alone to S + A for every image, beside the networks that it is held against."
    )
    picture = Picture("Accuracy over mean time", words, exit_figure(comparison))
    curves = [table_of(curve.network, EXIT_COLUMNS, curve.points) for curve in comparison.exits]
    return [Section("Early exit", [curve.sentence() for curve in comparison.exits], [picture, *curves])]


@plot_style()
def exit_figure(comparison: Comparison) -> Any:
    """The matplotlib Figure of accuracy over mean time: a line for each S + A, a point for each control."""
    figure = new_figure(WIDTH, 3.4)
    axes = figure.subplots()
    for curve, style in zip(comparison.exits, itertools.cycle(("-", "--", ":"))):
        times, accuracies = ([getattr(point, name) for point in curve.points] for name in ("mean_ms", "top1"))
        axes.plot(
            times, accuracies, style, marker="o", markersize=4, color=COLOURS["fused"], label=short(curve.network)
        )
    for row in comparison.rows:
        if row.part in CONTROLS and row.p50_ms is not None:
            axes.plot(row.p50_ms, row.top1, "s", markersize=6, color=COLOURS[row.part], label=short(row.name))
    frame(axes)
    axes.set_xlabel("Mean time of one image, ms", color=INK)
    axes.set_ylabel("Top-1, %", color=INK)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure

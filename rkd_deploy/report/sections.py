"""Chooses and describes the pictures and tables in the report of a bench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rkd_deploy.bench.ceilings import Ceilings
from rkd_deploy.bench.layers import LayerMedian, LayerTimes
from rkd_deploy.bench.reading import BenchRecord
from rkd_deploy.bench.results import Figures, Result
from rkd_deploy.bench.roofline import Achieved, Roofline, achieved
from rkd_deploy.report import accuracy_latency, columns, plots
from rkd_deploy.report.page import Picture, Section, Table, table_of
from rkd_deploy.report.style import WIDTH, distinct, series_colours
from rkd_deploy.report.tables import Column, milliseconds

Colours = Mapping[str, str]


def sections(records: Sequence[BenchRecord]) -> list[Section]:
    """The sections of a page of some records, their results side by side; empty sections are left out."""
    results = [result for record in records for result in record.results if result.p50_ms]
    named = _by_batch(results)
    colours = _colours(named)
    candidates = [
        Section(
            "Accuracy, latency, throughput",
            list(verdict_sentences(results)),
            [*_accuracy(results), *_throughput(named, colours)],
        ),
        *_latency(named, colours),
        *_roofline(_joined([record.roofline for record in records]), results, colours),
        *_layers([times for record in records for times in record.layers], colours),
        *_environment([environment(record) for record in records]),
    ]
    return [section for section in candidates if section.text or section.blocks]


def environment(record: BenchRecord) -> dict[str, Any]:
    """Provenance and settings of a record as one flat table, name to value."""
    known = asdict(record.provenance)
    versions, gpus, git = known.pop("versions"), known.pop("gpus"), known.pop("git")
    flat = {**known, **{f"setting {name}": value for name, value in record.settings.items()}}
    flat |= {name: version for name, version in versions.items() if version is not None}
    for number, gpu in enumerate(gpus or ()):
        flat |= {f"GPU {number} {name}": value for name, value in gpu.items()}
    if git:
        flat["commit"] = f"{str(git.get('commit'))[:12]}{', changed since' if git.get('dirty') else ''}"
    return flat


def remark(record: BenchRecord) -> str:
    """The sentence of a partial record, with the results that were cut short; the others in it are whole."""
    cut = [
        f"{result.model} on {result.backend}{'' if result.threads is None else f', threads {result.threads}'}, "
        f"batch {result.batch}"
        for result in record.results
        if columns.cut_short(result)
    ]
    return "Interrupted: what had been measured until then." + (f" Cut short: {'; '.join(cut)}." if cut else "")


def _joined(rooflines: Sequence[Roofline]) -> Roofline:
    return Roofline(
        tuple(ceilings for roofline in rooflines for ceilings in roofline.ceilings),
        tuple(prediction for roofline in rooflines for prediction in roofline.predictions),
    )


def _by_batch(results: Sequence[Result]) -> dict[int, dict[str, Result]]:
    """Batch to name to result; names tell apart what shares a batch size."""
    batches = distinct(sorted(result.batch for result in results))
    grouped = {batch: [result for result in results if result.batch == batch] for batch in batches}
    return {
        batch: dict(zip(_unique(accuracy_latency.point_names(group)), group, strict=True))
        for batch, group in grouped.items()
    }


def _unique(names: Sequence[str]) -> list[str]:
    """Number names that stand several times: a file measured twice has one name, and neither may hide the other."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return unique


def _colours(named: Mapping[int, Mapping[str, Result]]) -> Colours:
    """One colour for each name on the whole page."""
    parts = {name: result.part for group in named.values() for name, result in group.items()}
    names = distinct(name for group in named.values() for name in group)
    return dict(zip(names, series_colours([parts[name] for name in names]), strict=True))


def verdict_sentences(results: Sequence[Result]) -> Iterator[str]:
    """A sentence for each S + A: its time and accuracy beside those of the most accurate S0 run the same way."""
    for ours in results:
        if ours.part != "fused":
            continue
        conditions = (ours.backend, ours.device, ours.batch, ours.threads)
        others = [
            other
            for other in results
            if other.part == "s0" and (other.backend, other.device, other.batch, other.threads) == conditions
        ]
        if others:
            other = max(others, key=lambda result: result.accuracy or 0.0)
            sentence = f"{ours.model}: {ours.p50_ms / other.p50_ms:.2f} of the median latency of {other.model}"
            if ours.accuracy is not None and other.accuracy is not None:
                sentence += f", {ours.accuracy - other.accuracy:+.2f} points of accuracy"
            yield f"{sentence} ({ours.backend}, batch {ours.batch})."


def _accuracy(results: Sequence[Result]) -> Iterator[Picture | Table]:
    known = [result for result in results if result.accuracy is not None]
    if results:
        yield table_of("Results", columns.RESULT_COLUMNS, results)
    if known:
        batch = min(result.batch for result in known)
        front = accuracy_latency.pareto_front([result for result in known if result.batch == batch])
        best = ", ".join(
            f"{name} ({result.accuracy:.2f} % in {milliseconds(result.p50_ms)} ms)"
            for name, result in zip(accuracy_latency.point_names(front), front, strict=True)
        )
        figure = accuracy_latency.draw(known, size=(WIDTH, 3.9), titled=False)
        words = (
            "Up and to the left is better. Bars are 95 % confidence intervals, of the median and of the accuracy on "
            f"other test images; the dashed staircase is the Pareto front, of models that none beats in both: {best}."
        )
        yield Picture(f"Accuracy against latency, batch {batch}", words, figure)


def _latency(named: Mapping[int, Mapping[str, Result]], colours: Colours) -> Iterator[Section]:
    rows = columns.rows_of([result for group in named.values() for result in group.values()])
    blocks: list[Picture | Table] = []
    for batch, group in named.items():
        both = {f"{name}{kind}": part for name, result in group.items() for kind, part in _kinds(result)}
        sampled = {name: part for name, part in both.items() if part.samples_ms}
        shades = {f"{name}{kind}": colours[name] for name, result in group.items() for kind, _ in _kinds(result)}
        if not sampled:
            continue
        calls = sum(len(result.samples_ms) for result in sampled.values())
        figures = "; ".join(
            f"{name}: p50 {milliseconds(part.p50_ms)} ms, slowest {milliseconds(max(part.samples_ms))} ms"
            for name, part in sampled.items()
        )
        blocks += [
            Picture(
                f"Latency, cumulative, batch {batch}",
                f"Of all {calls:,} calls, none left out, the share that took at most so long. Dotted: p50, p90, p99. "
                f"{figures}.",
                plots.distributions(sampled, shades),
            ),
            Picture(
                f"Latency, histogram, batch {batch}",
                f"The same {calls:,} calls, as the share in each bin. Dotted: the median.",
                plots.histograms(sampled, shades),
            ),
        ]
    if rows:
        blocks.append(table_of("Percentiles, with their 95 % confidence intervals", columns.PERCENTILE_COLUMNS, rows))
        blocks.append(table_of("Runs and memory", columns.RUN_COLUMNS, rows, folded=True))
    text = [_BOTH] if any(result.device_only for group in named.values() for result in group.values()) else []
    yield Section("Every call", text, blocks)


_BOTH = (
    "End to end is from an array on the host to logits on the host; device only is the same model, in turns with it, "
    "with input and output left on the device. Accuracy, throughput and roofline are drawn with the former."
)


def _kinds(result: Result) -> list[tuple[str, Figures]]:
    """Figures of a result, host to host and device only, each after what its name ends in."""
    alone = result.device_only
    return [("", result), *([] if alone is None else [(", device only", alone)])]


def _throughput(named: Mapping[int, Mapping[str, Result]], colours: Colours) -> Iterator[Picture]:
    if len(named) < 2:
        return
    names = distinct(name for group in named.values() for name in group)
    lines = {name: [group[name] for group in named.values() if name in group] for name in names}
    most = "; ".join(
        f"{name}: {max(point.throughput_per_s for point in points):,.0f} images/s at batch "
        f"{max(points, key=lambda point: point.throughput_per_s).batch}"
        for name, points in lines.items()
    )
    words = f"Images per second of one caller that never waits, over the images in a call. Most: {most}."
    yield Picture("Throughput over batch size", words, plots.throughputs(lines, colours))


def _roofline(roofline: Roofline, results: Sequence[Result], colours: Colours) -> Iterator[Section]:
    predictions, ceilings = roofline.predictions, roofline.ceilings
    if not predictions:
        return
    measured = achieved(predictions, results)
    blocks: list[Picture | Table] = [table_of("Bound and measurement", columns.ROOFLINE_COLUMNS, measured)]
    points = _under_the_roof(measured)
    if points and ceilings:
        lines = _roofs(ceilings)
        spare = dict(zip(points, series_colours([None] * len(points)), strict=True))
        shares = [point.share for point in measured if point.share is not None]
        words = (
            "A line is a roof, what this machine was seen to do at the most through one backend; a point is a "
            "model, numbered by its batch size. Left of the bend memory is the limit, right of it arithmetic. The "
            f"models reach {100 * min(shares):.0f} % to {100 * max(shares):.0f} % of it."
        )
        figure = plots.roofs(lines, points, {**spare, **colours})
        blocks.append(Picture("Roofline", words, figure))
    text = [
        "No call can be faster than its multiply-adds at the machine's best rate, nor than its weights, input and "
        "outputs moved once: the bound was told before anything was timed. It knows nothing of what it costs to start "
        "an operator, which is most of the time of a small network.",
        *sorted({f"{prediction.model}: {prediction.note}." for prediction in predictions if prediction.note}),
    ]
    kernels = [(ceiling, name, rate) for ceiling in ceilings for name, rate in ceiling.kernels.items()]
    if kernels:
        blocks.append(table_of("The machine's ceilings", _KERNELS, kernels))
    yield Section("Prediction and measurement", text, blocks)


_KERNELS: tuple[Column[Any], ...] = (
    Column("Backend", lambda k: f"{k[0].backend} {k[0].device}", numeric=False, setting=True),
    Column("Threads", lambda k: None if k[0].threads is None else str(k[0].threads), setting=True),
    Column("Arithmetic", lambda k: k[0].arithmetic, numeric=False, setting=True),
    Column("Kernel", lambda k: k[1], numeric=False),
    Column("GMAC/s", lambda k: f"{k[2] / 1e9:,.3g}"),
)


def _roofs(ceilings: Sequence[Ceilings]) -> list[tuple[str, float, float]]:
    """Name, MAC/s and bytes/s: of the working set that memory serves fastest, and of the one it serves slowest."""
    lines = []
    for ceiling in ceilings:
        threads = "" if ceiling.threads is None else f", threads {ceiling.threads}"
        name = f"{ceiling.backend}{threads}, {ceiling.arithmetic}: " if len(ceilings) > 1 else ""
        # Memory serves a working set that fits a cache faster than one that does not. Two slopes only where they can be
        # told apart on paper.
        fast, slow = max(ceiling.bytes_per_s.values()), min(ceiling.bytes_per_s.values())
        lines += [(name, ceiling.macs_per_s, rate) for rate in ([fast, slow] if fast > 1.3 * slow else [fast])]
    return lines


def _under_the_roof(measured: Sequence[Achieved]) -> dict[str, list[tuple[float, float, int]]]:
    """MACs per byte, MAC/s and batch of each measurement, by model."""
    points: dict[str, list[tuple[float, float, int]]] = {}
    predictions = [achievement.prediction for achievement in measured]
    for achievement, prediction, name in zip(
        measured, predictions, accuracy_latency.point_names(predictions), strict=True
    ):
        if prediction.macs and prediction.least_bytes and achievement.p50_ms and prediction.bound_ms:
            intensity = prediction.macs / prediction.least_bytes
            points.setdefault(name, []).append(
                (intensity, 1000 * prediction.macs / achievement.p50_ms, prediction.batch)
            )
    return points


def _layers(measured: Sequence[LayerTimes], colours: Colours) -> Iterator[Section]:
    pictures: list[Picture | Table] = []
    tables: list[Picture | Table] = []
    known = [times for times in measured if times.layers]
    spare = series_colours([None] * len(known))
    for times, colour in zip(known, spare, strict=True):
        total = sum(layer.ms for layer in times.layers)
        longest = max(times.layers, key=lambda layer: layer.ms)
        threads = "" if times.threads is None else f", threads {times.threads}"
        where = f"{times.model} on {times.backend}{threads}, batch {times.batch}"
        words = (
            f"{len(times.layers)} layers, {milliseconds(total)} ms together, medians of {times.runs} runs. Longest: "
            f"{longest.name} ({longest.op}), {100 * longest.ms / (total or 1):.0f} %."
        )
        figure = plots.layer_bars(times.layers, colours.get(times.model, colour), 14 if len(known) < 4 else 6)
        pictures.append(Picture(f"Layers of {where}", words, figure))
        tables.append(
            table_of(f"All layers of {where}", _LAYER_COLUMNS, [(layer, total) for layer in times.layers], folded=True)
        )
    text = (
        "From runs of their own, after the timed ones, with the runtime's profiling on: they divide a call, and their "
        "sum is a little more than its latency.",
    )
    if pictures:
        yield Section("Layer by layer", text, [*pictures, *tables])


_LAYER_COLUMNS: tuple[Column[tuple[LayerMedian, float]], ...] = (
    Column("Layer", lambda row: row[0].name, numeric=False),
    Column("Type", lambda row: row[0].op, numeric=False),
    Column("In", lambda row: row[0].precision, numeric=False),
    Column("Time, ms", lambda row: milliseconds(row[0].ms)),
    Column("Share, %", lambda row: f"{100 * row[0].ms / (row[1] or 1):.1f}"),
)


def _environment(environments: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    if not environments:
        return
    names = distinct(name for environment in environments for name in environment)
    rows = [
        [name, *[_words(environment.get(name)) for environment in environments]]
        for name in names
        if any(environment.get(name) is not None for environment in environments)
    ]
    heads = ["Value"] if len(environments) == 1 else [f"Record {number + 1}" for number in range(len(environments))]
    table = Table("Machine, versions and settings", ["What", *heads], [False] * (1 + len(heads)), rows)
    yield Section("Environment", (), [table])


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

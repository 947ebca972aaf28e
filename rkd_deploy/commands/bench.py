"""The commands that measure: bench, bench-compare and report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.commands.options import (
    RUNS,
    BackendName,
    DeviceName,
    Json,
    Root,
    Threads,
    as_dict,
    batch_sizes,
    console_for,
    newest_bundle,
    output_folder,
    parse_ints,
    print_json,
    report_folder,
    require_all,
    without_samples,
)
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.bench.results import Result


def report(
    records: Annotated[list[Path], typer.Argument(help="bench.json files, or one compare.json.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the page. Default: that of the first record.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a page of records.

    Self-contained HTML and Markdown; several benches, of several machines say, side by side.
    """
    require_all("train", "matplotlib")
    from rkd_deploy.bench.reading import read_bench, read_record
    from rkd_deploy.commands.options import status
    from rkd_deploy.report.tables import print_line
    from rkd_deploy.report.writing import write_bench_report

    folder = output or records[0].parent
    kinds = [read_record(path)["kind"] for path in records]
    if kinds == ["compare"]:
        require_all("train", "torch", "safetensors")
        from rkd_deploy.compare import read_comparison, write_comparison_report

        comparison = read_comparison(records[0])
        with status("Drawing"):
            pages = write_comparison_report(comparison, folder)
    elif set(kinds) == {"bench"}:
        benches = [read_bench(path) for path in records]
        with status("Drawing"):
            pages = write_bench_report(benches, folder)
    else:
        raise UsageError(
            f"{len(kinds)} records of the kinds {', '.join(sorted(set(kinds)))}: give bench.json files, or one "
            "compare.json."
        )
    print_line(f"Report {pages.page}", console_for(as_json))
    if as_json:
        print_json({"report": str(pages.page), "markdown": str(pages.markdown)})


Backends = Annotated[list[str], typer.Option("--backend", help="Several with commas; rkd-deploy backends lists them.")]
ShapeOption = Annotated[
    str | None, typer.Option("--shape", help="Of one input, e.g. 3,224,224, where the model leaves it open.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="FOLDER/CLASS/image: measure top-1 of the same file, on the same backend.")
]


def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles, ONNX files, engines. Default: the newest bundle.", show_default=False),
    ] = None,
    backends: Backends = ["onnxruntime"],  # noqa: B006 (Typer copies it)
    device: DeviceName = None,
    batches: Annotated[
        str | None, typer.Option("--batch", help="Batch sizes. Default: 1,8,32, or the model's own.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="CPU threads, e.g. 1,2. Default: the runtime's choice.")
    ] = None,
    streams: Annotated[str, typer.Option("--streams", help="Callers at once, each with its own copy: 1,2.")] = "1",
    memory_limit: Annotated[
        int | None, typer.Option("--memory-limit", help="Most device memory for the runtime, in MiB (CUDA).")
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph/--no-cuda-graph", help="Engines: capture the runs, or launch kernel by kernel."),
    ] = True,
    shape: ShapeOption = None,
    min_seconds: Annotated[
        float, typer.Option("--seconds", help="Time each model at each batch at least so long.")
    ] = 2.0,
    min_runs: Annotated[int, typer.Option("--count", help="Time at least so many calls.")] = 100,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds of calls before, not counted.")] = 0.5,
    resident: Annotated[
        bool, typer.Option("--resident", help="Only device-only figures. Default: those and end-to-end ones.")
    ] = False,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Only end-to-end figures.")] = False,
    data: Data = None,
    scenarios: Annotated[
        list[str] | None,
        typer.Option("--scenario", help="Repeatable: SingleStream, MultiStream, Server, Offline. LoadGen, unofficial."),
    ] = None,
    target_qps: Annotated[
        float | None, typer.Option("--target-qps", help="Of Server. Default: half of what one caller gets.")
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option("--target-latency", help="Of Server: its bound, in ms. Default: 15.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for bench.json, bench.md, a plot. Default: runs/bench-TIME.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="As --output, with a page in it (bench.html), its roofline and layers."),
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline",
            help="First tell how fast they could be here, on each backend with each thread count.",
        ),
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", help="Print every percentile, times, memory and the machine's state too.")
    ] = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Measure latency, throughput and memory of models (docs/guides/bench.md). Ctrl-C keeps what was measured."""
    if resident and end_to_end:
        raise UsageError("--resident and --end-to-end leave nothing to measure together. Leave both out for both.")
    if roofline:
        require_all("export", "onnx")
    chosen_folder = report_folder(report, output)
    from rkd_deploy.backends import check_backend
    from rkd_deploy.bench.mlperf import SERVER_LATENCY_MS, Load, check_scenarios
    from rkd_deploy.bench.reading import read_bench
    from rkd_deploy.bench.records import record_bench
    from rkd_deploy.bench.roofline import Analysis
    from rkd_deploy.bench.settings import BenchSettings, check_models, combinations
    from rkd_deploy.commands.options import status
    from rkd_deploy.image_folders import left_out_below, left_out_in_words
    from rkd_deploy.report.columns import print_bench, print_roofline
    from rkd_deploy.report.tables import print_line
    from rkd_deploy.report.writing import write_bench_report, write_tables

    settings = BenchSettings(
        run_on=combinations(
            [name.strip() for names in backends for name in names.split(",")],
            device=device,
            threads=None if threads is None else parse_ints("--threads", threads),
            streams=parse_ints("--streams", streams),
            memory_limit=None if memory_limit is None else memory_limit << 20,
            cuda_graph=cuda_graph,
        ),
        batches=None if batches is None else tuple(batch_sizes(batches)),
        min_seconds=min_seconds,
        min_runs=min_runs,
        warmup_seconds=warmup,
        transfers=False if resident else True if end_to_end else None,
        shape=None if shape is None else tuple(parse_ints("--shape", shape)),
        data=data,
    )
    scenario_names = scenarios or []
    check_scenarios(scenario_names)
    if "Server" not in scenario_names and (target_qps, target_latency) != (None, None):
        raise UsageError(
            "--target-qps and --target-latency are Server's: give --scenario Server too, or leave them out."
        )
    load = None
    if scenario_names:
        bound = SERVER_LATENCY_MS if target_latency is None else target_latency
        load = Load(min_seconds=min_seconds, min_queries=min_runs, target_qps=target_qps, target_latency_ms=bound)
    for place in settings.run_on:  # before a bundle is sought: it may be needless to make one
        check_backend(place.backend)
    chosen = models or [newest_bundle(root)]
    check_models(chosen, settings.run_on)
    console = console_for(as_json)
    analysis = Analysis(chosen, settings.run_on, settings.batches, shape=settings.shape)
    if roofline or (report is not None and find_spec("onnx") is not None):
        with status("Predicting") as update:
            analysis.predict(update)
        assert analysis.roofline is not None
        print_roofline(analysis.roofline.predictions, [], console)

    def analyse(results: Sequence[Result]) -> dict[str, Any]:
        if report is not None:
            analysis.profile(update, batch=min(result.batch for result in results))
        return analysis.to_record()

    with output_folder(chosen_folder, root, "bench") as folder:
        with status("Measuring") as update:
            recorded = record_bench(
                chosen, settings, folder, update, scenarios=scenario_names, load=load, analyse=analyse
            )
        record = read_bench(recorded.path)
        write_tables(record, folder)
        print_bench(record, console, details=details)
        print_line(f"Record {recorded.path}" + ("" if details else "; more: --details"), console)
        if data is not None and (left_out := left_out_below(data)):
            print_line(
                f"Left out of --data, because their suffix is no image's: {left_out_in_words(left_out)}", console
            )
        written = {"record": str(recorded.path)}
        if recorded.error is not None:
            raise recorded.error
        if report is not None:
            with status("Drawing the report"):
                written["report"] = str(write_bench_report([record], folder).page)
            print_line(f"Report {written['report']}", console)
    if as_json:
        scenarios_json = [as_dict(scenario) for scenario in record.scenarios]
        predicted = analysis.to_record().get("roofline")
        print_json(
            {**written, "results": without_samples(record.results), "loadgen": scenarios_json, "roofline": predicted}
        )


def bench_compare(
    a: Annotated[Path, typer.Argument(help="A bench.json, or a model.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The same kind of thing, compared with A.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="B may be slower by this share before the exit code is 3.")
    ] = 0.0,
    backend: BackendName = "onnxruntime",
    device: DeviceName = "cpu",
    batches: Annotated[str, typer.Option("--batch", help="Batch sizes, for models.")] = "1,8,32",
    threads: Threads = None,
    min_seconds: Annotated[float, typer.Option("--seconds", help="Time each model at each batch so long.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Say whether B is faster or slower than A.

    Two models are measured side by side, now; two records (bench.json) as they lie. Exit code 3: B is slower, and
    chance does not explain it.
    """
    from rkd_deploy.backends import RunOn
    from rkd_deploy.bench import compare
    from rkd_deploy.bench.reading import read_bench
    from rkd_deploy.commands.options import status
    from rkd_deploy.errors import GateError
    from rkd_deploy.fields import check_number
    from rkd_deploy.report import columns
    from rkd_deploy.report.tables import print_line

    check_number("--tolerance", tolerance, 0, 1000)
    check_number("--seconds", min_seconds, 0, 86400)
    records = [path.suffix == ".json" for path in (a, b)]
    differing: list[str] = []
    if all(records):
        ours, theirs = read_bench(a), read_bench(b)
        ratios = compare.recorded_ratios(ours.results, theirs.results)
        differing = compare.differing_environment(ours.provenance, theirs.provenance)
    elif any(records):
        raise UsageError(f"{a} and {b}: give two models, or two records (bench.json), not one of each.")
    else:
        with status(f"Measuring on {backend}") as update:
            ratios = compare.measure_ratios(
                a,
                b,
                RunOn(backend, device=device, threads=threads),
                batches=batch_sizes(batches),
                min_seconds=min_seconds,
                progress=update,
            )
    console = console_for(as_json)
    columns.print_ratios(ratios, console)
    for line in differing:
        print_line(f"Measured under different conditions: {line}", console, style="yellow")
    slower = [ratio for ratio in ratios if ratio.low > 1 + tolerance]
    if as_json and not slower:
        print_json({"ratios": [ratio.to_dict() for ratio in ratios], "differing": differing})
    if slower:
        worst = max(slower, key=lambda ratio: ratio.low)
        raise GateError(
            f"{worst.b} is slower than {worst.a} at batch {worst.batch}: {worst.ratio:.3f} times its latency, at least "
            f"{worst.low:.3f} times; {1 + tolerance:.3f} is allowed (--tolerance {tolerance:g})."
        )

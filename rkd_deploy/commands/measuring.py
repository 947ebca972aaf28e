"""How fast models are."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from rkd_deploy.commands.options import (
    RUNS,
    BackendName,
    DeviceName,
    Json,
    Root,
    Threads,
    batch_sizes,
    brief,
    console_for,
    emit,
    need,
    newest_bundle,
)
from rkd_deploy.commands.reporting import report_folder
from rkd_deploy.errors import UsageError


def bench(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Bundles or ONNX files. Default: the newest bundle.", show_default=False)
    ] = None,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    batches: Annotated[str, typer.Option("--batch", help="Batch sizes, one after the other.")] = "1,8,32",
    threads: Threads = None,
    min_seconds: Annotated[
        float, typer.Option("--seconds", help="Time each model at each batch at least so long.")
    ] = 2.0,
    min_runs: Annotated[int, typer.Option("--count", help="Time at least so many calls.")] = 100,
    resident: Annotated[
        bool, typer.Option("--resident", help="Leave input and output on the device, instead of host to host.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for bench.json, bench.md, a plot. Default: runs/bench-TIME.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="As --output, with a page in it (bench.html), its roofline and layers."),
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="First tell how fast the models could be on this machine.")
    ] = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of models."""
    sizes = batch_sizes(batches)
    folder = report_folder(report, output) or root / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if roofline:
        need("export", "onnx")
    from rkd_deploy.serve.backends import check_backend
    from rkd_deploy.serve.bench import bench as bench_models
    from rkd_deploy.serve.bench.display import status
    from rkd_deploy.serve.bench.recording import write_report
    from rkd_deploy.serve.bench.report import print_table
    from rkd_deploy.serve.bench.studying import Study
    from rkd_deploy.serve.reporting.records import read_records
    from rkd_deploy.serve.reporting.writing import write_bench_report

    check_backend(backend)
    chosen = models or [newest_bundle(root)]
    settings: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "batches": sizes,
        "threads": threads,
        "min_seconds": min_seconds,
        "min_runs": min_runs,
        "transfers": not resident,
    }
    console = console_for(as_json)
    study = Study(chosen, sizes, backend=backend, device=device, threads=threads)
    if roofline or (report is not None and find_spec("onnx") is not None):
        with status("Predicting") as update:
            study.predict(update)
        study.print_roofline([], console)
    with status(f"Measuring on {backend}") as update:
        results = bench_models(chosen, **settings, progress=update)
    if report is not None:
        with status("Profiling") as update:
            study.profile(update)
    written = write_report(results, settings, folder, study.to_record())
    print_table(results, console)
    study.print_roofline(results, console)
    console.print(f"Record {written.record}")
    made = {"record": str(written.record)}
    if report is not None:
        with status("Drawing the report"):
            made["report"] = str(write_bench_report(read_records([written.record]), folder).page)
        console.print(f"Report {made['report']}")
    if as_json:
        emit({**made, "results": brief(results), "roofline": study.to_record().get("roofline")})


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
    from rkd_deploy.errors import GateError
    from rkd_deploy.serve.bench import ratio
    from rkd_deploy.serve.bench.display import status

    records = [path.suffix == ".json" for path in (a, b)]
    differing: list[str] = []
    if all(records):
        one, other = ratio.read_record(a), ratio.read_record(b)
        found = ratio.recorded_ratios(one["results"], other["results"])
        differing = ratio.differing_environment(one["provenance"], other["provenance"])
    elif any(records):
        raise UsageError(f"{a} and {b}: give two models, or two records (bench.json), not one of each.")
    else:
        with status(f"Measuring on {backend}") as update:
            found = ratio.measure_ratios(
                a,
                b,
                batches=batch_sizes(batches),
                min_seconds=min_seconds,
                backend=backend,
                device=device,
                threads=threads,
                progress=update,
            )
    console = console_for(as_json)
    ratio.print_ratios(found, console)
    for line in differing:
        console.print(f"Measured under different conditions: {line}", style="yellow")
    slower = [one for one in found if one.low > 1 + tolerance]
    if as_json and not slower:
        emit({"ratios": [one.to_dict() for one in found], "differing": differing})
    if slower:
        worst = max(slower, key=lambda one: one.low)
        raise GateError(
            f"{worst.b} is slower than {worst.a} at batch {worst.batch}: {worst.ratio:.3f} times its latency, at least "
            f"{worst.low:.3f} times; {1 + tolerance:.3f} is allowed (--tolerance {tolerance:g})."
        )

"""The commands that train: quickstart, train and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    output_folder,
    parse_ints,
    print_json,
    report_folder,
    require_all,
    without_samples,
)
from rkd_deploy.errors import UsageError, command_line
from rkd_deploy.text import visible


def quickstart(root: Root = RUNS, as_json: Json = False) -> None:
    """Train, export and bench the embedded example."""
    require_all("train", "torch", "torchvision", "safetensors", "sklearn", "matplotlib")
    require_all("export", "onnx", "onnxscript")
    from rkd_deploy.pipeline import quickstart as run_quickstart
    from rkd_deploy.report.columns import print_results
    from rkd_deploy.report.tables import print_line
    from rkd_deploy.train.display import ProgressDisplay
    from rkd_deploy.train.networks import PARTS
    from rkd_deploy.train.verdict import of_metrics, verdict_json

    with ProgressDisplay() as progress:
        outcome = run_quickstart(
            root, progress, lambda line: progress.console.print(visible(line), style="bold", markup=False)
        )
    console = console_for(as_json)
    print_results(outcome.results, console)
    if (verdict := of_metrics(outcome.run.metrics, PARTS)) is not None:
        print_line(verdict.sentence(), console)
    files = {
        "Run": outcome.run.folder,
        "Bundle": outcome.bundles["fused"],
        "Table": outcome.tables.table,
        "Plot": outcome.tables.plot,
    }
    for name, path in files.items():
        print_line(f"{name:<8} {path}", console)
    if as_json:
        bundles = {part: str(folder) for part, folder in outcome.bundles.items()}
        print_json(
            {
                "run": str(outcome.run.folder),
                "bundles": bundles,
                "plot": str(outcome.tables.plot),
                "results": without_samples(outcome.results),
                **verdict_json(verdict),
            }
        )


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe (TOML), or a run folder to resume.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace one value: table.key=value. Another method.name empties [method]."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="What S and A must not exceed of S0's: macs, params, latency. student.budget."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="What a budget of latency is measured on. student.backend."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where that runs: cpu, cuda, cuda:N. student.latency_device."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run (default: the newest).")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Train once with each of these, e.g. 0,1,2: mean and deviation.")
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print every key of a recipe, as TOML, and train nothing.")
    ] = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Train T, S0, S and A by a recipe.

    Without one: the embedded recipe, digits, or photos with --set data.name=imagefolder.
    """
    if keys:
        if recipe or overrides or budget or backend or device or resume or seeds:
            raise UsageError("--keys prints what a recipe can say, and trains nothing. Leave the other options out.")
        _print_keys(as_json)
        return
    require_all("train", "torch", "safetensors")
    from rkd_deploy.recipe import read_recipe
    from rkd_deploy.train.display import ProgressDisplay, print_parts, print_series
    from rkd_deploy.train.distributed import is_main_process
    from rkd_deploy.train.embedded import embedded_recipe
    from rkd_deploy.train.fitting import fit
    from rkd_deploy.train.fitting import resume as resume_run
    from rkd_deploy.train.networks import PARTS
    from rkd_deploy.train.runs import newest_run, open_run
    from rkd_deploy.train.series import fit_series
    from rkd_deploy.train.verdict import of_metrics, of_series, verdict_json

    named = {"budget": budget, "backend": backend, "latency_device": device}
    named_keys = [f"student.{key}={value}" for key, value in named.items() if value is not None]
    overrides = [*(overrides or ()), *named_keys]
    if resume and overrides and seeds is None:
        raise UsageError(
            "--resume goes on with the recipe of the run; --set, --budget, --backend and --device cannot change it. "
            "Start a new run instead."
        )
    if seeds is not None:
        chosen = embedded_recipe(overrides) if recipe is None else read_recipe(recipe, overrides)
        with ProgressDisplay() as progress:
            series = fit_series(chosen, parse_ints("--seeds", seeds), root=root, display=progress, resumed=resume)
        if is_main_process():
            print_series(series, console_for(as_json))
            console_for(as_json).print(f"Series {series.path}")
            if as_json:
                print_json(series.to_dict() | verdict_json(of_series(series.parts, PARTS)))
        return
    with ProgressDisplay() as progress:
        if resume:
            unfinished = newest_run(root, finished=False) if recipe is None else open_run(recipe)
            run = resume_run(unfinished, display=progress)
        else:
            chosen = embedded_recipe(overrides) if recipe is None else read_recipe(recipe, overrides)
            run = fit(chosen, root=root, display=progress)
    if not is_main_process():  # torchrun's other processes
        return
    console = console_for(as_json)
    print_parts(run.metrics, run.facts, console)
    console.print(f"Run {run.folder}. Next: {command_line('export', run.folder)}", markup=False)
    if as_json:
        verdict = verdict_json(of_metrics(run.metrics, PARTS))
        separation = run.facts.to_json().get("separation")
        print_json({"run": str(run.folder), **run.metrics.to_json(), "separation": separation, **verdict})


def _print_keys(as_json: bool) -> None:
    from rkd_deploy.recipe.keys import keys_as_toml, recipe_keys

    typer.echo(keys_as_toml(), nl=False, err=as_json)
    if as_json:
        print_json({"keys": [as_dict(key) for key in recipe_keys()]})


def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished run folders. Default: the newest.")] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Export and time every network too.")] = True,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    batches: Annotated[
        str, typer.Option("--batch", help="Images in one timed call, or several: the table tells of the first.")
    ] = "1",
    threads: Threads = None,
    min_seconds: Annotated[float, typer.Option("--seconds", help="Time each network at least so long.")] = 1.0,
    early_exit: Annotated[
        bool, typer.Option("--early-exit", help="Measure S + A with A on demand too, over thresholds.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for table, plot, record. Default: runs/compare-TIME.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="As --output, with a page in it (compare.html), its roofline and layers."),
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Put the networks of several runs side by side.

    T, S0, S alone, S + A and the baselines: accuracy, MACs, parameters, latency, as a table and a plot.
    """
    require_all("train", "torch", "safetensors")
    chosen_folder = report_folder(report, output)
    from rkd_deploy.backends import RunOn, check_backend
    from rkd_deploy.bench.settings import BenchSettings
    from rkd_deploy.commands.options import status
    from rkd_deploy.compare import (
        compare_runs,
        print_comparison,
        read_comparison,
        timed,
        write_comparison,
        write_comparison_report,
    )
    from rkd_deploy.compare.report import to_record
    from rkd_deploy.report.tables import print_line
    from rkd_deploy.train.runs import newest_run, open_run

    if early_exit and not latency:
        raise UsageError("--early-exit measures time, and --no-latency forbids that. Leave one of them out.")
    comparison = compare_runs([open_run(run) for run in runs] if runs else [newest_run(root, finished=True)])
    if latency:
        require_all("export", "onnx", "onnxscript")
        check_backend(backend)
        settings = BenchSettings(
            run_on=(RunOn(backend, device=device, threads=threads),),
            batches=tuple(batch_sizes(batches)),
            min_seconds=min_seconds,
        )
        with status(f"Comparing on {backend}") as update:
            comparison = timed(comparison, settings, studied=report is not None, early_exit=early_exit, progress=update)
    console = console_for(as_json)
    with output_folder(chosen_folder, root, "compare") as folder:
        written = write_comparison(comparison, folder)
        print_comparison(comparison, console)
        for name, file in (("Record", written.record), ("Table", written.table), ("Plot", written.plot)):
            print_line(f"{name:<7} {file}", console)
        files = {"record": str(written.record)}
        if report is not None:
            with status("Drawing the report"):
                files["report"] = str(write_comparison_report(read_comparison(written.record), folder).page)
            print_line(f"Report  {files['report']}", console)
    if as_json:
        record = to_record(comparison)
        print_json({**record, "results": without_samples(comparison.results), **files})

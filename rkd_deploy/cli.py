"""The command line: options to function calls, results to text or JSON. No logic lives here.

Text for people goes to standard output; with --json one JSON object is the last line there, and people's text goes to
standard error. Exit codes: 0 done, 1 could not be done, 2 wrong usage, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.errors import RkdError, UsageError, require, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from rkd_deploy.serve.engines.settings import EngineSettings

app = typer.Typer(
    name="rkd-deploy",
    help="Residual knowledge distillation for image classifiers: train, export, measure, embed.",
    epilog="Start with: rkd-deploy quickstart. A traceback is shown only with --debug, which any command takes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the time that --help may take
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of standard output.")]
Root = Annotated[Path, typer.Option("--runs", help="Folder of runs.", show_default=True)]
BackendName = Annotated[str, typer.Option("--backend", help="onnxruntime, pytorch, ...: see rkd-deploy backends.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N. Default: cpu; cuda where a backend has only that.")
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: the runtime's choice.")]
Model = Annotated[Path, typer.Argument(help="A bundle folder or an ONNX file.", show_default=False)]
Newest = Annotated[Path | None, typer.Argument(help="Default: the newest.", show_default=False)]

RUNS = Path("runs")

# How to build an engine: --format tensorrt and tensorrt-rtx only; EngineSettings says more of each.
Profiles = Annotated[
    list[str] | None,
    typer.Option("--profile", help="Engine: MIN:OPT:MAX batch, or one fixed batch; repeatable. Default: 1:8:32."),
]
Capabilities = Annotated[
    list[str] | None,
    typer.Option("--compute-capability", help="Engine, RTX: a GPU to build for, e.g. 8.6; repeatable. Default: all."),
]
Hardware = Annotated[
    str | None, typer.Option("--hardware", help="Engine, TensorRT: runs on ampere+ or same-capability GPUs, not one.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Engine, TensorRT: runs in later versions too, slower.")
]
Refit = Annotated[bool, typer.Option("--refit", help="Engine: weights can be replaced without a new build.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Engine: let float32 products round to 10 bits of mantissa.")]
Effort = Annotated[int | None, typer.Option("--optimization", help="Engine: 0 to 5, how long to look for kernels.")]
Workspace = Annotated[int | None, typer.Option("--workspace", help="Engine: most scratch memory, in MiB.")]
TimingCache = Annotated[
    Path | None, typer.Option("--timing-cache", help="Engine, TensorRT: file of kernel timings, read and written.")
]
FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        from rkd_deploy import __version__

        typer.echo(f"rkd-deploy {__version__}")
        raise typer.Exit


@app.command()
def quickstart(root: Root = RUNS, as_json: Json = False) -> None:
    """Train, export and bench the embedded example."""
    _need("train", "torch", "torchvision", "safetensors", "sklearn", "matplotlib")
    _need("export", "onnx", "onnxscript")
    from rkd_deploy.pipeline import quickstart as run_quickstart
    from rkd_deploy.serve.bench.report import print_table
    from rkd_deploy.train.progress import Progress

    with Progress() as progress:
        made = run_quickstart(root, progress, lambda line: progress.console.print(f"[bold]{line}[/bold]"))
    console = _console(as_json)
    print_table(made.results, console)
    files = {
        "Run": made.run.folder,
        "Bundle": made.bundles["fused"],
        "Table": made.report.table,
        "Plot": made.report.plot,
    }
    for name, path in files.items():
        console.print(f"{name:<8} {path}")
    if as_json:
        bundles = {part: str(folder) for part, folder in made.bundles.items()}
        _emit(
            {
                "run": str(made.run.folder),
                "bundles": bundles,
                "plot": str(made.report.plot),
                "results": _brief(made.results),
            }
        )


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe (TOML), or a run folder to resume.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace one value: table.key=value. Another method.name empties [method]."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run (default: the newest).")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Train once with each of these, e.g. 0,1,2: mean and deviation.")
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Train T, S0, S and A by a recipe.

    Without one: the embedded example.
    """
    _need("train", "torch", "safetensors")
    from rkd_deploy.pipeline import embedded_recipe
    from rkd_deploy.recipe import read_recipe
    from rkd_deploy.train.fitting import fit
    from rkd_deploy.train.fitting import resume as resume_run
    from rkd_deploy.train.parallel import speaks
    from rkd_deploy.train.progress import Progress, print_parts, print_series
    from rkd_deploy.train.runs import newest_run, open_run
    from rkd_deploy.train.series import fit_series

    if resume and overrides and seeds is None:
        raise UsageError(
            "--resume goes on with the recipe of the run; --set cannot change it. Start a new run instead."
        )
    if seeds is not None:
        chosen = embedded_recipe(overrides or ()) if recipe is None else read_recipe(recipe, overrides or ())
        with Progress() as progress:
            series = fit_series(chosen, _whole("--seeds", seeds), root=root, display=progress, resumed=resume)
        if speaks():
            print_series(series, _console(as_json))
            _console(as_json).print(f"Series {series.path}")
            if as_json:
                _emit(series.to_dict())
        return
    with Progress() as progress:
        if resume:
            found = newest_run(root, finished=False) if recipe is None else open_run(recipe)
            run = resume_run(found, display=progress)
        else:
            chosen = embedded_recipe(overrides or ()) if recipe is None else read_recipe(recipe, overrides or ())
            run = fit(chosen, root=root, display=progress)
    if not speaks():  # torchrun's other processes
        return
    metrics, facts = run.read_json("metrics.json"), run.read_json("facts.json")
    console = _console(as_json)
    print_parts(metrics, facts, console)
    console.print(f"Run {run.folder}. Next: rkd-deploy export {run.folder}")
    if as_json:
        _emit({"run": str(run.folder), **metrics, "separation": facts.get("separation")})


@app.command()
def export(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run; for an engine a bundle or an ONNX file too. Default: the newest run."),
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="onnx; or an engine in the bundle as well: tensorrt, tensorrt-rtx.")
    ] = "onnx",
    part: Annotated[
        str | None,
        typer.Option("--part", help="fused (S + A; default), student (S alone), s0 (default of a baseline), teacher."),
    ] = None,
    level: Annotated[
        str,
        typer.Option("--fuse", help="tail (adapters and head one matrix), sum, wide, wide-grouped; auto measures."),
    ] = "tail",
    backend: Annotated[
        str | None, typer.Option("--backend", help="What --fuse auto measures on. Default: onnxruntime.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="For --fuse auto. Default: cpu.")] = None,
    batches: Annotated[
        str | None, typer.Option("--batch", help="For --fuse auto: all count alike, e.g. 1,8. Default: 1.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="For --fuse auto: CPU threads.")] = None,
    outputs: Annotated[
        str, typer.Option("--outputs", help="Any of logits,probabilities,features (features need --fuse sum).")
    ] = "logits",
    layout: Annotated[
        str, typer.Option("--input", help="uint8 (NHWC, pre-processing in the graph) or float32 (NCHW, normalised).")
    ] = "uint8",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference of a logit from PyTorch's.")
    ] = 1e-4,
    test_images: Annotated[
        bool, typer.Option("--test-images/--random-images", help="Prove on every test image, or on 64 random ones.")
    ] = True,
    with_pytorch: Annotated[
        bool, typer.Option("--with-pytorch", help="Write model.pt2 too, for --backend pytorch.")
    ] = False,
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16, int8 or fp8.")] = "fp32",
    target: Annotated[
        str | None, typer.Option("--target", help="Of a lower precision: cpu (default), tensorrt or openvino.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Folder of images to calibrate on. Default: training images.")
    ] = None,
    calibration_count: Annotated[
        int | None, typer.Option("--calibration-count", help="How many of them. Default: 256, or all there are.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws images to calibrate and to judge on.")] = 0,
    keep: Annotated[
        str, typer.Option("--keep", help="Layers to leave in float32: NAME,NAME or auto, which finds those that hurt.")
    ] = "",
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", help="Least % of held-out images that keep their class.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Most points of accuracy that may be lost on them.")
    ] = None,
    early_exit: Annotated[
        bool, typer.Option("--early-exit", help="Write S and each A as graphs of their own too, and report the saving.")
    ] = False,
    exit_threshold: Annotated[
        float | None,
        typer.Option("--exit-threshold", help="Confidence at which an image leaves. Default: by held-out images."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the bundle, default bundle in the run; of an engine alone its file."),
    ] = None,
    profiles: Profiles = None,
    capabilities: Capabilities = None,
    hardware: Hardware = None,
    version_compatible: VersionCompatible = False,
    refit: Refit = False,
    tf32: Tf32 = False,
    optimization: Effort = None,
    workspace: Workspace = None,
    timing_cache: TimingCache = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Fuse, export and prove a run.

    Default: the newest run. What is written is a bundle, proven against PyTorch, with an engine in it on request.
    """
    _choose("format", output_format, FORMATS)
    _choose("input", layout, ("uint8", "float32"))
    settings = _engine_settings(
        output_format,
        profiles=profiles,
        compute_capabilities=capabilities,
        hardware=hardware,
        version_compatible=version_compatible or None,
        refit=refit or None,
        tf32=tf32 or None,
        optimization_level=optimization,
        workspace_bytes=None if workspace is None else workspace << 20,
        timing_cache=timing_cache,
    )
    if settings is not None and run is not None and _is_model(run):
        _no_run_options(
            part=part is not None,
            fuse=level != "tail",
            outputs=outputs != "logits",
            input=layout != "uint8",
            tolerance=tolerance != 1e-4,
            random_images=not test_images,
            with_pytorch=with_pytorch,
        )
        alone = _export_engine(run, output_format, settings, output, as_json)
        if as_json:
            _emit({"engine": alone})
        return
    _need("export", "torch", "safetensors", "onnx", "onnxscript")
    measured_on = _fusion_target(level, backend, device, batches, threads)
    from rkd_deploy.export.precision import PrecisionOptions
    from rkd_deploy.pipeline import export_run
    from rkd_deploy.serve.bench.display import print_exits, status
    from rkd_deploy.serve.bundles import describe
    from rkd_deploy.train.runs import newest_run, open_run

    options = PrecisionOptions(
        precision=precision,
        target=target,
        calibration=calibration,
        count=calibration_count,
        seed=seed,
        keep=tuple(name.strip() for name in keep.split(",") if name.strip()),
        agreement=min_agreement,
        drop=max_drop,
    )
    chosen = newest_run(root, finished=True) if run is None else open_run(run)
    with status(f"Exporting {part or 'the network'} of {chosen.folder}") as update:
        made = export_run(
            chosen,
            part=part,
            level=level,
            outputs=[name.strip() for name in outputs.split(",")],
            embedded=layout == "uint8",
            tolerance=tolerance,
            with_pytorch=with_pytorch,
            test_images=test_images,
            early_exit=early_exit,
            exit_threshold=exit_threshold,
            folder=output,
            target=measured_on,
            progress=update,
            precision=options,
        )
    proof = made.proof
    console = _console(as_json)
    console.print(
        f"Parity passed: logits differ from PyTorch's by at most {proof.parity.max_abs_diff:.2g} "
        f"(tolerance {proof.parity.tolerance:g}) over {proof.images:,} images; {proof.differing} classified otherwise."
    )
    if proof.torch_top1 is not None and proof.onnx_top1 is not None:
        console.print(f"Top-1 on them: PyTorch {proof.torch_top1:.2f} %, ONNX Runtime {proof.onnx_top1:.2f} %.")
    if proof.judgement is not None:
        console.print(f"{precision}: {proof.judgement.in_words()}.")
        if proof.lowered_top1 is not None:
            console.print(f"Top-1 of the {precision} file on the test images: {proof.lowered_top1:.2f} %.")
    exits = describe(made.folder).early_exit
    if exits:
        print_exits(exits, console)
    console.print(f"Bundle {made.folder}. Next: rkd-deploy bench {made.folder}")
    engine = None if settings is None else _export_engine(made.folder, output_format, settings, None, as_json)
    if as_json:
        facts = {"images": proof.images, "differing": proof.differing}
        accuracy = {"torch_top1": proof.torch_top1, "onnx_top1": proof.onnx_top1}
        written = {"bundle": str(made.folder), "parity": proof.parity.to_dict()}
        added: dict[str, Any] = {} if engine is None else {"engine": engine}
        if proof.judgement is not None:
            added |= {"precision": precision, "gate": proof.judgement.to_dict()}
        _emit({**written, **facts, **accuracy, "early_exit": exits, **added})


@app.command()
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
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of models."""
    sizes = _sizes(batches)
    from rkd_deploy.serve.backends import check_backend
    from rkd_deploy.serve.bench import bench as bench_models
    from rkd_deploy.serve.bench.display import status
    from rkd_deploy.serve.bench.recording import write_report
    from rkd_deploy.serve.bench.report import print_table

    check_backend(backend)
    chosen = models or [_newest_bundle(root)]
    settings: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "batches": sizes,
        "threads": threads,
        "min_seconds": min_seconds,
        "min_runs": min_runs,
        "transfers": not resident,
    }
    with status(f"Measuring on {backend}") as update:
        results = bench_models(chosen, **settings, progress=update)
    folder = output or root / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    report = write_report(results, settings, folder)
    console = _console(as_json)
    print_table(results, console)
    console.print(f"Record {report.record}")
    if as_json:
        _emit({"record": str(report.record), "results": _brief(results)})


@app.command("bench-compare")
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
                batches=_sizes(batches),
                min_seconds=min_seconds,
                backend=backend,
                device=device,
                threads=threads,
                progress=update,
            )
    console = _console(as_json)
    ratio.print_ratios(found, console)
    for line in differing:
        console.print(f"Measured under different conditions: {line}", style="yellow")
    slower = [one for one in found if one.low > 1 + tolerance]
    if as_json and not slower:
        _emit({"ratios": [one.to_dict() for one in found], "differing": differing})
    if slower:
        worst = max(slower, key=lambda one: one.low)
        raise GateError(
            f"{worst.b} is slower than {worst.a} at batch {worst.batch}: {worst.ratio:.3f} times its latency, at least "
            f"{worst.low:.3f} times; {1 + tolerance:.3f} is allowed (--tolerance {tolerance:g})."
        )


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished run folders. Default: the newest.")] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Export and time every network too.")] = True,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    batch: Annotated[int, typer.Option("--batch", help="Images in one timed call.")] = 1,
    threads: Threads = None,
    min_seconds: Annotated[float, typer.Option("--seconds", help="Time each network at least so long.")] = 1.0,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for table, plot, record. Default: runs/compare-TIME.")
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Put the networks of several runs side by side.

    T, S0, S alone, S + A and the baselines: accuracy, MACs, parameters, latency, as a table and a plot.
    """
    _need("train", "torch", "safetensors")
    from rkd_deploy.compare import compare as compare_runs
    from rkd_deploy.compare import print_comparison, timed, write_comparison
    from rkd_deploy.compare.report import to_record
    from rkd_deploy.serve.backends import check_backend
    from rkd_deploy.serve.bench.display import status
    from rkd_deploy.train.runs import newest_run, open_run

    found = compare_runs([open_run(run) for run in runs] if runs else [newest_run(root, finished=True)])
    settings: dict[str, Any] = {}
    if latency:
        _need("export", "onnx", "onnxscript")
        check_backend(backend)
        settings = {"backend": backend, "device": device, "batch": _sizes(str(batch))[0], "threads": threads}
        settings["min_seconds"] = min_seconds
        with status(f"Comparing on {backend}") as update:
            found = timed(found, **settings, progress=update)
    written = write_comparison(found, settings, output or root / f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    console = _console(as_json)
    print_comparison(found, console)
    for name, file in (("Record", written.record), ("Table", written.table), ("Plot", written.plot)):
        console.print(f"{name:<7} {file}")
    if as_json:
        _emit({**to_record(found, settings), "record": str(written.record)})


@app.command()
def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option("--top", help="How many classes of each.")] = 5,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    threads: Threads = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option("--exit-threshold", help="Run the assistants only where the student is less confident than this."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify image files."""
    from rkd_deploy.serve.classifier import load

    found = {}
    with load(model, backend=backend, device=device, threads=threads, exit_threshold=exit_threshold) as classifier:
        for image in images:
            best = classifier.predict(image, top=top)
            found[str(image)] = [{"label": one.label, "probability": one.probability} for one in best]
            shown = ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in best)
            typer.echo(f"{image}: {shown}", err=as_json)
        exits = list(classifier.exits)
    if exits:
        typer.echo(f"{exits[0]} of {sum(exits)} images left after S alone.", err=as_json)
    if as_json:
        _emit({"predictions": found, **({"exits": exits} if exits else {})})


@app.command()
def verify(
    model: Newest = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Default: every one that is installed and can run the bundle.")
    ] = None,
    device: DeviceName = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Default: the bundle's own.")] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Prove a bundle again from its golden data.

    Its files are compared with their checksums, its logits with the stored ones.
    """
    from rkd_deploy.serve.bench.parity import gate
    from rkd_deploy.serve.bench.parity import verify as verify_bundle
    from rkd_deploy.serve.bench.verification import Verdict, verify_everywhere

    chosen = model or _newest_bundle(root)
    if backend is None:
        verdicts = verify_everywhere(chosen, device=device, tolerance=tolerance)
    else:
        verdicts = [Verdict(backend, verify_bundle(chosen, backend, device=device, tolerance=tolerance), None)]
    for verdict in verdicts:
        if (parity := verdict.parity) is None:
            line = f"not run: {verdict.reason}"
        else:
            line = (
                f"logits differ by at most {parity.max_abs_diff:.2g} "
                f"(tolerance {parity.tolerance:g}) over {parity.n} images."
            )
        typer.echo(f"{chosen} on {verdict.backend}: {line}", err=as_json)
    for verdict in verdicts:
        if verdict.parity is not None:
            gate(verdict.parity, f"{chosen} on {verdict.backend}")
    if as_json:
        found = [{"backend": one.backend, "parity": one.parity and one.parity.to_dict()} for one in verdicts]
        _emit({"bundle": str(chosen), "backends": found})


@app.command()
def info(model: Newest = None, root: Root = RUNS, as_json: Json = False) -> None:
    """Show the card of a bundle or an ONNX file, or an engine's record.

    Precision, fusion, checksums, what it was exported with. Files that were changed are an error.
    """
    from rkd_deploy.serve.bundles import describe
    from rkd_deploy.serve.engines.record import record_path

    if model is not None and record_path(model).is_file():
        _show_engine(model, as_json)
        return
    card = json.loads(describe(model or _newest_bundle(root)).to_json())
    if as_json:
        _emit(card)
        return
    labels, checksums, versions = card.pop("labels"), card.pop("checksums"), card.pop("versions")
    for key, value in card.items():
        typer.echo(f"{key:>13}  {json.dumps(value) if isinstance(value, dict) else value}")
    typer.echo(f"{'labels':>13}  {len(labels)}: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}")
    for name, checksum in checksums.items():
        typer.echo(f"{'unchanged':>13}  {name}, SHA-256 {checksum}")
    typer.echo(f"{'exported with':>13}  {', '.join(f'{key} {value}' for key, value in versions.items())}")


def _show_engine(file: Path, as_json: bool) -> None:
    from rkd_deploy.serve.engines.layers import layer_table
    from rkd_deploy.serve.engines.record import read_engine

    record = read_engine(file)[1]
    assert record is not None
    content = record.to_dict()
    if as_json:
        _emit(content)
        return
    layers = content.pop("layers")
    del content["metadata"]  # the model's card, which is shown of the model
    for key, value in content.items():
        typer.echo(f"{key:>20}  {json.dumps(value) if isinstance(value, dict | list | tuple) else value}")
    typer.echo(layer_table(layers))


@app.command()
def backends(as_json: Json = False) -> None:
    """List the backends and what works here."""
    from rkd_deploy.serve.backends import available

    found = available()
    for status in found:
        state = f"works on {', '.join(status.devices)}" if status.ok else status.reason
        version = f" {status.version}" if status.version else ""
        typer.echo(f"{status.name + version:<24} {state}", err=as_json)
    if as_json:
        _emit({"backends": [_plain(status) for status in found]})


def main() -> None:
    """Entry point of the `rkd-deploy` command."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (RkdError, KeyboardInterrupt) as error:
        if debug:
            raise
        code = error.exit_code if isinstance(error, RkdError) else 130
        message = str(error) or "Interrupted."
        print(f"Error: {message}", file=sys.stderr)
        if "--json" in sys.argv:
            _emit({"error": message, "exit_code": code})
        sys.exit(code)


def _fusion_target(
    level: str, backend: str | None, device: str | None, batches: str | None, threads: int | None
) -> Any:
    """What --fuse auto measures on; None for a level that is not measured."""
    given = {"--backend": backend, "--device": device, "--batch": batches, "--threads": threads}
    if level != "auto":
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{option} {value} says what --fuse auto measures on; --fuse {level} measures nothing."
                )
        return None
    from rkd_deploy.export.selection import Target
    from rkd_deploy.serve.backends import check_backend

    check_backend(backend or "onnxruntime")
    return Target(backend or "onnxruntime", device or "cpu", threads, tuple(_sizes(batches or "1")))


def _engine_settings(output_format: str, **given: Any) -> EngineSettings | None:
    """None for a format that is no engine, which none of these options then fits."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if output_format == "onnx":
        if chosen:
            named = ", ".join(sorted(name.replace("_", " ") for name in chosen))
            raise UsageError(f"--format onnx builds no engine, and has no use for: {named}. Leave it out.")
        return None
    from rkd_deploy.serve.engines.build import gpu_to_build_on
    from rkd_deploy.serve.engines.flavours import load_flavour
    from rkd_deploy.serve.engines.settings import EngineSettings, Profile

    for name, read in (("profiles", Profile.parse), ("compute_capabilities", str)):
        if name in chosen:
            chosen[name] = tuple(read(text) for text in chosen[name])
    settings, library = EngineSettings(**chosen), load_flavour(output_format)
    settings.check(library)  # before minutes of exporting, not after
    gpu_to_build_on(library, settings)
    return settings


def _no_run_options(**given: bool) -> None:
    named = ", ".join(f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given)
    if named:
        raise UsageError(f"An engine of an ONNX file is what that file is, and has no use for {named}: export a run.")


def _is_model(path: Path) -> bool:
    from rkd_deploy.serve.files import ONNX_NAME

    return path.suffix == ".onnx" or (path / ONNX_NAME).exists()


def _export_engine(
    model: Path, flavour: str, settings: EngineSettings, output: Path | None, as_json: bool
) -> dict[str, Any]:
    from rkd_deploy.export.engine import export_engine
    from rkd_deploy.serve.bench.display import status

    with status(f"Building the {flavour} engine of {model}") as update:
        made = export_engine(model, flavour, settings, output=output, progress=update)
    record = made.record
    _console(as_json).print(
        f"Engine {made.file}: {flavour} {record.version}, {record.precision}, {record.engine_bytes / 1e6:,.2f} MB, "
        f"built in {record.build_seconds:,.1f} s. Next: rkd-deploy bench {made.file} --backend {flavour}"
    )
    return {**{key: value for key, value in record.to_dict().items() if key != "layers"}, "file": str(made.file)}


def _newest_bundle(root: Path) -> Path:
    from rkd_deploy.serve.bundles import newest_bundle

    return newest_bundle(root)


def _need(extra: str, *modules: str) -> None:
    """Say at once, with the install line, what a command lacks."""
    for module in modules:
        if find_spec(module) is None:
            require(module, extra)


def _choose(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(unknown_name(f"--{option}", value, choices))


def _whole(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} must be whole numbers, separated by commas, e.g. {option} 0,1,2."
        ) from error


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch {text!r} must be whole numbers from 1, separated by commas, e.g. --batch 1,8,32.")
    return sizes


def _emit(content: Any) -> None:
    print(json.dumps(content, allow_nan=False), flush=True)


def _brief(results: Any) -> list[dict[str, Any]]:
    """Results without their samples, which fill pages; the record has them."""
    return [{key: value for key, value in _plain(result).items() if key != "samples_ms"} for result in results]


def _plain(item: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item)


def _console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

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
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: the runtime's choice.")]
Model = Annotated[Path, typer.Argument(help="A bundle folder or an ONNX file.", show_default=False)]
Newest = Annotated[Path | None, typer.Argument(help="Default: the newest.", show_default=False)]

RUNS = Path("runs")


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
        list[str] | None, typer.Option("--set", help="Replace one value of the recipe: table.key=value.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run (default: the newest).")
    ] = False,
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
    from rkd_deploy.train.progress import Progress, print_parts
    from rkd_deploy.train.runs import newest_run, open_run

    if resume and overrides:
        raise UsageError(
            "--resume goes on with the recipe of the run; --set cannot change it. Start a new run instead."
        )
    with Progress() as progress:
        if resume:
            found = newest_run(root, finished=False) if recipe is None else open_run(recipe)
            run = resume_run(found, display=progress)
        else:
            chosen = embedded_recipe(overrides or ()) if recipe is None else read_recipe(recipe, overrides or ())
            run = fit(chosen, root=root, display=progress)
    metrics, facts = run.read_json("metrics.json"), run.read_json("facts.json")
    console = _console(as_json)
    print_parts(metrics, facts, console)
    console.print(f"Run {run.folder}. Next: rkd-deploy export {run.folder}")
    if as_json:
        _emit({"run": str(run.folder), **metrics, "separation": facts.get("separation")})


@app.command()
def export(
    run: Newest = None,
    output_format: Annotated[str, typer.Option("--format", help="onnx.")] = "onnx",
    part: Annotated[
        str | None,
        typer.Option("--part", help="fused (S + A; default), student (S alone), s0 (default of a baseline), teacher."),
    ] = None,
    level: Annotated[
        str, typer.Option("--fuse", help="tail (adapters and head folded into one matrix) or sum.")
    ] = "tail",
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
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the bundle. Default: bundle in the run folder.")
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Fuse, export and prove a run.

    Default: the newest run. What is written is a bundle, proven against PyTorch.
    """
    _choose("format", output_format, ("onnx",))
    _choose("input", layout, ("uint8", "float32"))
    _need("export", "torch", "safetensors", "onnx", "onnxscript")
    from rkd_deploy.export.precision import PrecisionOptions
    from rkd_deploy.pipeline import export_run
    from rkd_deploy.serve.bench.display import status
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
    with status(f"Exporting {part or 'the network'} of {chosen.folder}"):
        made = export_run(
            chosen,
            part=part,
            level=level,
            outputs=[name.strip() for name in outputs.split(",")],
            embedded=layout == "uint8",
            tolerance=tolerance,
            with_pytorch=with_pytorch,
            test_images=test_images,
            folder=output,
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
    console.print(f"Bundle {made.folder}. Next: rkd-deploy bench {made.folder}")
    if as_json:
        facts = {"images": proof.images, "differing": proof.differing}
        accuracy = {"torch_top1": proof.torch_top1, "onnx_top1": proof.onnx_top1}
        lowered = {} if proof.judgement is None else {"precision": precision, "gate": proof.judgement.to_dict()}
        _emit({"bundle": str(made.folder), "parity": proof.parity.to_dict(), **facts, **accuracy, **lowered})


@app.command()
def bench(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Bundles or ONNX files. Default: the newest bundle.", show_default=False)
    ] = None,
    backend: BackendName = "onnxruntime",
    device: DeviceName = "cpu",
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


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished run folders. Default: the newest.")] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Export and time every network too.")] = True,
    backend: BackendName = "onnxruntime",
    device: DeviceName = "cpu",
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
    device: DeviceName = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Classify image files."""
    from rkd_deploy.serve.classifier import load

    found = {}
    with load(model, backend=backend, device=device, threads=threads) as classifier:
        for image in images:
            best = classifier.predict(image, top=top)
            found[str(image)] = [{"label": one.label, "probability": one.probability} for one in best]
            shown = ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in best)
            typer.echo(f"{image}: {shown}", err=as_json)
    if as_json:
        _emit({"predictions": found})


@app.command()
def verify(
    model: Newest = None,
    backend: BackendName = "onnxruntime",
    device: DeviceName = "cpu",
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Default: the bundle's own.")] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Prove a bundle again from its golden data."""
    from rkd_deploy.serve.bench.parity import gate
    from rkd_deploy.serve.bench.parity import verify as verify_bundle

    chosen = model or _newest_bundle(root)
    parity = verify_bundle(chosen, backend, device=device, tolerance=tolerance)
    if as_json and parity.passed:
        _emit({"bundle": str(chosen), "backend": backend, "parity": parity.to_dict()})
    gate(parity, f"{chosen} on {backend}")
    typer.echo(
        f"{chosen} on {backend}: logits differ by at most {parity.max_abs_diff:.2g} "
        f"(tolerance {parity.tolerance:g}) over {parity.n} images.",
        err=as_json,
    )


@app.command()
def info(model: Newest = None, root: Root = RUNS, as_json: Json = False) -> None:
    """Show the card of a bundle or an ONNX file."""
    from rkd_deploy.serve.bundles import describe

    card = json.loads(describe(model or _newest_bundle(root)).to_json())
    if as_json:
        _emit(card)
        return
    labels = card.pop("labels")
    for key, value in card.items():
        typer.echo(f"{key:>11}  {json.dumps(value) if isinstance(value, dict) else value}")
    typer.echo(f"{'labels':>11}  {len(labels)}: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}")


@app.command()
def backends(as_json: Json = False) -> None:
    """List the backends and what works here."""
    from rkd_deploy.serve.backends import available

    found = available()
    for status in found:
        state = f"works on {', '.join(status.devices)}" if status.ok else status.reason
        version = f" {status.version}" if status.version else ""
        typer.echo(f"{status.name + version:<24} {state}", err=as_json)
        if status.install and not status.ok:
            typer.echo(f"{'':<24} {status.install}", err=as_json)
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

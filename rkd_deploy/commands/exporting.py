"""From a run to a bundle or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.commands.engines import add_engine, engine_settings
from rkd_deploy.commands.options import (
    FORMATS,
    RUNS,
    Capabilities,
    Effort,
    Hardware,
    Json,
    Profiles,
    Refit,
    Root,
    Tf32,
    TimingCache,
    VersionCompatible,
    Workspace,
    batch_sizes,
    choose,
    console_for,
    emit,
    need,
)
from rkd_deploy.commands.precision import (
    CalibrationCount,
    CalibrationFolder,
    Keep,
    MaxDrop,
    MinAgreement,
    PrecisionName,
    Seed,
    TargetName,
    read_precision,
)
from rkd_deploy.commands.triton import (
    InstanceGroup,
    MaxBatch,
    ModelName,
    OnConfig,
    Preferred,
    QueueDelay,
    Repository,
    ServeVersions,
    StorageUri,
    TritonBackend,
    read_serving,
    write_repository,
)
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.export.precision import PrecisionOptions
    from rkd_deploy.pipeline import Exported


def export(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run; for an engine or Triton a bundle or ONNX file too. Default: the newest run."),
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="onnx; and an engine in it (tensorrt, tensorrt-rtx), or triton beside it.")
    ] = "onnx",
    part: Annotated[
        str | None,
        typer.Option("--part", help="fused (S + A; default), student (S alone), s0 (default of a baseline), teacher."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            "--fuse",
            help="tail (adapters and head one matrix), sum, wide, wide-grouped; auto measures. Default: what a budget "
            "of latency was met with, else tail.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="What --fuse auto measures on. Default: onnxruntime, or that of --target."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="For --fuse auto. Default: the backend's.")] = None,
    batches: Annotated[
        str | None, typer.Option("--batch", help="For --fuse auto: all count alike, e.g. 1,8. Default: 1.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads: for --fuse auto, and of a Triton instance.")
    ] = None,
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
    precision: PrecisionName = "fp32",
    target: TargetName = None,
    calibration: CalibrationFolder = None,
    calibration_count: CalibrationCount = None,
    seed: Seed = 0,
    keep: Keep = "",
    min_agreement: MinAgreement = None,
    max_drop: MaxDrop = None,
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
    repository: Repository = None,
    triton_backend: TritonBackend = None,
    model_name: ModelName = None,
    max_batch: MaxBatch = None,
    preferred_batch: Preferred = None,
    queue_delay: QueueDelay = None,
    instances: InstanceGroup = None,
    serve_versions: ServeVersions = None,
    storage_uri: StorageUri = None,
    on_config: OnConfig = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Fuse, export and prove a run.

    Default: the newest run. What is written is a bundle, proven against PyTorch; on request an engine in it, or a model
    repository for Triton beside it.
    """
    choose("format", output_format, FORMATS)
    choose("input", layout, ("uint8", "float32"))
    settings = engine_settings(
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
    serving = read_serving(
        output_format,
        repository,
        backend=triton_backend,
        name=model_name,
        max_batch=max_batch,
        preferred=preferred_batch,
        queue_delay_us=queue_delay,
        instances=instances,
        threads=threads,
        versions=serve_versions,
        storage_uri=storage_uri,
        config=on_config,
    )
    if output_format != "onnx" and run is not None and _is_model(run):
        _no_run_options(
            part=part is not None,
            fuse=level is not None,
            outputs=outputs != "logits",
            input=layout != "uint8",
            tolerance=tolerance != 1e-4,
            random_images=not test_images,
            with_pytorch=with_pytorch,
            precision=precision != "fp32",
            target=target is not None,
            calibration=calibration is not None,
            calibration_count=calibration_count is not None,
            seed=seed != 0,
            keep=bool(keep),
            min_agreement=min_agreement is not None,
            max_drop=max_drop is not None,
            early_exit=early_exit,
            exit_threshold=exit_threshold is not None,
            backend=backend is not None,
            device=device is not None,
            batch=batches is not None,
            threads=serving is None and threads is not None,
            output=serving is not None and output is not None,
        )
        if serving is None:
            alone = add_engine(run, output_format, settings, output, as_json)
        else:
            alone = write_repository(run, repository, serving, as_json)
        if as_json:
            emit(alone)
        return
    if serving is not None and serving.backend == "tensorrt":
        raise UsageError(
            "--triton-backend tensorrt serves the plan in a bundle, and a bundle exported just now has none. Build it "
            "first, with --format tensorrt, where the server's TensorRT and GPU are; then give that bundle here."
        )
    need("export", "torch", "safetensors", "onnx", "onnxscript")
    from rkd_deploy.pipeline import export_run
    from rkd_deploy.serve.bench.display import status
    from rkd_deploy.train.runs import newest_run, open_run

    options = read_precision(precision, target, calibration, calibration_count, seed, keep, min_agreement, max_drop)
    measuring_threads = None if serving is not None and level != "auto" else threads
    measured_on = _fusion_target(level, backend, device, batches, measuring_threads, options)
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
    _tell(made, precision, as_json)
    added = add_engine(made.folder, output_format, settings, None, as_json)
    if serving is not None:
        added = write_repository(made.folder, repository, serving, as_json)
    if as_json:
        emit(_facts(made, precision) | added)


def _tell(made: Exported, precision: str, as_json: bool) -> None:
    """What was proven, in words."""
    from rkd_deploy.serve.bench.display import print_exits
    from rkd_deploy.serve.bundles import describe

    proof = made.proof
    console = console_for(as_json)
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


def _facts(made: Exported, precision: str) -> dict[str, Any]:
    """What was proven, for --json."""
    from rkd_deploy.serve.bundles import describe

    proof = made.proof
    lowered = {} if proof.judgement is None else {"precision": precision, "gate": proof.judgement.to_dict()}
    return {
        "bundle": str(made.folder),
        "parity": proof.parity.to_dict(),
        "images": proof.images,
        "differing": proof.differing,
        "torch_top1": proof.torch_top1,
        "onnx_top1": proof.onnx_top1,
        "early_exit": describe(made.folder).early_exit,
        **lowered,
    }


def _fusion_target(
    level: str | None,
    backend: str | None,
    device: str | None,
    batches: str | None,
    threads: int | None,
    precision: PrecisionOptions,
) -> Any:
    """What --fuse auto measures on; None for a level that is not measured."""
    given = {"--backend": backend, "--device": device, "--batch": batches, "--threads": threads}
    if level != "auto":
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{option} {value} says what --fuse auto measures on; --fuse {level or 'tail'} measures nothing."
                )
        return None
    from rkd_deploy.export.selection import Target
    from rkd_deploy.serve.backends import check_backend

    chosen = backend or (precision.runs_on[0] if precision.lowered else "onnxruntime")
    check_backend(chosen)
    return Target(chosen, device, threads, tuple(batch_sizes(batches or "1")))


def _no_run_options(**given: bool) -> None:
    named = ", ".join(f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given)
    if named:
        raise UsageError(f"A model that is exported already is what it is, and has no use for {named}: export a run.")


def _is_model(path: Path) -> bool:
    from rkd_deploy.serve.files import ONNX_NAME

    return path.suffix == ".onnx" or (path / ONNX_NAME).exists()

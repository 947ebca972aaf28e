"""From a run to a bundle or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    whole,
)
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.backends.tensorrt.settings import EngineSettings
    from rkd_deploy.export.precision.options import PrecisionOptions
    from rkd_deploy.pipeline import Exported
    from rkd_deploy.serve.triton.settings import Serving


def engine_settings(output_format: str, **given: Any) -> EngineSettings | None:
    """None for a format that is no engine, which none of these options then fits."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if output_format in ("onnx", "triton"):
        if chosen:
            named = ", ".join(sorted(name.replace("_", " ") for name in chosen))
            raise UsageError(f"--format {output_format} builds no engine, and has no use for: {named}. Leave it out.")
        return None
    from rkd_deploy.backends.tensorrt.build import gpu_to_build_on
    from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile, load_library

    for name, read in (("profiles", Profile.parse), ("compute_capabilities", str)):
        if name in chosen:
            chosen[name] = tuple(read(text) for text in chosen[name])
    settings, library = EngineSettings(**chosen), load_library(output_format)
    settings.check(library)  # before minutes of exporting, not after
    gpu_to_build_on(library, settings)
    return settings


def add_engine(
    model: Path, flavour: str, settings: EngineSettings | None, output: Path | None, as_json: bool
) -> dict[str, Any]:
    """Build an engine where one was asked for; what is known of it, for --json."""
    if settings is None:
        return {}
    from rkd_deploy.backends.tensorrt.cache import export_engine
    from rkd_deploy.commands.options import status

    with status(f"Building the {flavour} engine of {model}") as update:
        made = export_engine(model, flavour, settings, output=output, progress=update)
    record = made.record
    console_for(as_json).print(
        f"Engine {made.file}: {flavour} {record.version}, {record.precision}, {record.engine_bytes / 1e6:,.2f} MB, "
        f"built in {record.build_seconds:,.1f} s. Next: rkd-deploy bench {made.file} --backend {flavour}"
    )
    facts = {key: value for key, value in record.to_dict().items() if key != "layers"}
    return {"engine": {**facts, "file": str(made.file)}}


PrecisionName = Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16, int8 or fp8.")]
TargetName = Annotated[
    str | None, typer.Option("--target", help="Of a lower precision: cpu (default), tensorrt or openvino.")
]
CalibrationFolder = Annotated[
    Path | None, typer.Option("--calibration", help="Folder of images to calibrate on. Default: training images.")
]
CalibrationCount = Annotated[
    int | None, typer.Option("--calibration-count", help="How many of them. Default: 256, or all there are.")
]
Seed = Annotated[int, typer.Option("--seed", help="Draws images to calibrate and to judge on.")]
Keep = Annotated[
    str, typer.Option("--keep", help="Layers to leave in float32: NAME,NAME or auto, which finds those that hurt.")
]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Least % of held-out images that keep their class.")
]
MaxDrop = Annotated[float | None, typer.Option("--max-drop", help="Most points of accuracy that may be lost on them.")]


def read_precision(
    precision: str,
    target: str | None,
    calibration: Path | None,
    count: int | None,
    seed: int,
    keep: str,
    min_agreement: float | None,
    max_drop: float | None,
) -> PrecisionOptions:
    """What is asked for, in the export's own words; see the options above.

    Raises:
        UsageError: A combination that cannot be, or an option that has no effect.
    """
    from rkd_deploy.export.precision.options import PrecisionOptions

    return PrecisionOptions(
        precision=precision,
        target=target,
        calibration=calibration,
        count=count,
        seed=seed,
        keep=tuple(name.strip() for name in keep.split(",") if name.strip()),
        agreement=min_agreement,
        drop=max_drop,
    )


Repository = Annotated[
    Path | None, typer.Option("--repository", help="Triton: the model repository. Default: triton beside the bundle.")
]
TritonBackend = Annotated[
    str | None, typer.Option("--triton-backend", help="Triton: onnxruntime (default), tensorrt (a plan) or python.")
]
ModelName = Annotated[
    str | None, typer.Option("--model-name", help="Triton: of the model in the repository. Default: by its card.")
]
MaxBatch = Annotated[
    int | None, typer.Option("--max-batch", help="Triton: most images of one run. Default: 32, or the plan's.")
]
Preferred = Annotated[
    str | None, typer.Option("--preferred-batch", help="Triton: batch sizes to wait for, e.g. 8,32 (the default).")
]
QueueDelay = Annotated[
    int | None,
    typer.Option("--queue-delay", help="Triton: microseconds to wait for a batch. Default: 2000."),
]
InstanceGroup = Annotated[
    str | None, typer.Option("--instances", help="Triton: cpu or gpu, and how many copies, e.g. cpu:2. Default: 1.")
]
ServeVersions = Annotated[
    str | None, typer.Option("--serve-versions", help="Triton: how many of the newest answer, or all. Default: 1.")
]
StorageUri = Annotated[
    str | None,
    typer.Option("--storage-uri", help="Triton: where KServe fetches the repository, e.g. s3://bucket/models."),
]
OnConfig = Annotated[
    str | None, typer.Option("--config", help="Triton: keep or replace a config.pbtxt that stands there and differs.")
]

_OPTIONS = {
    "backend": "--triton-backend",
    "name": "--model-name",
    "max_batch": "--max-batch",
    "preferred": "--preferred-batch",
    "queue_delay_us": "--queue-delay",
    "instances": "--instances",
    "versions": "--serve-versions",
    "storage_uri": "--storage-uri",
    "config": "--config",
}
"""Field of `Serving` to the option that sets it and nothing else."""


def read_serving(output_format: str, repository: Path | None, **given: Any) -> Serving | None:
    """None for another format, which none of these options then fits."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if output_format != "triton":
        foreign = sorted(_OPTIONS[name] for name in chosen.keys() & _OPTIONS.keys())
        foreign += ["--repository"] if repository is not None else []
        if foreign:
            raise UsageError(
                f"--format {output_format} writes no model repository, and has no use for {', '.join(foreign)}. "
                "Leave it out, or give --format triton."
            )
        return None
    need("export", "onnx")
    from rkd_deploy.serve.triton.settings import Instances, Serving

    if "preferred" in chosen:
        chosen["preferred"] = tuple(whole("--preferred-batch", chosen["preferred"]))
    if "instances" in chosen:
        chosen["instances"] = Instances.parse(chosen["instances"])
    if "versions" in chosen:
        chosen["versions"] = _versions(chosen["versions"])
    return Serving(**chosen)


def _versions(text: str) -> int | None:
    """How many; None for all."""
    if text != "all" and not text.isdecimal():
        raise UsageError(f"--serve-versions {text!r} must be a number or all.")
    return None if text == "all" else int(text)


def write_repository(model: Path, repository: Path | None, serving: Serving, as_json: bool) -> dict[str, Any]:
    """Write a bundle or an ONNX file as the next version, and say so; what is known of it, for --json."""
    from rkd_deploy.backends.files import model_path
    from rkd_deploy.serve.triton.repository import export_triton
    from rkd_deploy.serve.triton.settings import STORAGE_URI

    folder = model_path(model).parent
    beside = (folder.resolve() if folder.name in ("", "..") else folder).with_name("triton")
    written = export_triton(model, repository or beside, serving)
    console = console_for(as_json)
    console.print(f"Model repository {written.repository}: {written.name}, version {written.version}.")
    for file in written.kept:
        console.print(f"CachedEngine as it was: {file}")
    if serving.storage_uri == STORAGE_URI and written.service not in written.kept:
        console.print(f"For KServe, replace {STORAGE_URI} in {written.service}, or give --storage-uri.")
    console.print(f"Next: tritonserver --model-repository={written.repository}")
    facts = {"name": written.name, "version": written.version, "kept": [str(file) for file in written.kept]}
    return {"triton": {"repository": str(written.repository), "service": str(written.service), **facts}}


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
    from rkd_deploy.commands.options import status
    from rkd_deploy.pipeline import export_run
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
    from rkd_deploy.backends import describe_model
    from rkd_deploy.report.columns import print_exits

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
    exits = describe_model(made.folder).early_exit
    if exits:
        print_exits(exits, console)
    console.print(f"Bundle {made.folder}. Next: rkd-deploy bench {made.folder}")


def _facts(made: Exported, precision: str) -> dict[str, Any]:
    """What was proven, for --json."""
    from rkd_deploy.backends import describe_model

    proof = made.proof
    lowered = {} if proof.judgement is None else {"precision": precision, "gate": proof.judgement.to_dict()}
    return {
        "bundle": str(made.folder),
        "parity": proof.parity.to_dict(),
        "images": proof.images,
        "differing": proof.differing,
        "torch_top1": proof.torch_top1,
        "onnx_top1": proof.onnx_top1,
        "early_exit": describe_model(made.folder).early_exit,
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
    from rkd_deploy.backends import RunOn, check_backend
    from rkd_deploy.export.measuring import Target

    chosen = backend or (precision.runs_on[0] if precision.lowered else "onnxruntime")
    check_backend(chosen)
    return Target(RunOn(chosen, device=device, threads=threads), tuple(batch_sizes(batches or "1")))


def _no_run_options(**given: bool) -> None:
    named = ", ".join(f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given)
    if named:
        raise UsageError(f"A model that is exported already is what it is, and has no use for {named}: export a run.")


def _is_model(path: Path) -> bool:
    from rkd_deploy.backends.files import ONNX_NAME

    return path.suffix == ".onnx" or (path / ONNX_NAME).exists()

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
)
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.serve.engines.settings import EngineSettings


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
        str | None,
        typer.Option(
            "--fuse",
            help="tail (adapters and head one matrix), sum, wide, wide-grouped; auto measures. Default: what a budget "
            "of latency was met with, else tail.",
        ),
    ] = None,
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
    choose("format", output_format, FORMATS)
    choose("input", layout, ("uint8", "float32"))
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
            fuse=level is not None,
            outputs=outputs != "logits",
            input=layout != "uint8",
            tolerance=tolerance != 1e-4,
            random_images=not test_images,
            with_pytorch=with_pytorch,
        )
        alone = _export_engine(run, output_format, settings, output, as_json)
        if as_json:
            emit({"engine": alone})
        return
    need("export", "torch", "safetensors", "onnx", "onnxscript")
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
    engine = None if settings is None else _export_engine(made.folder, output_format, settings, None, as_json)
    if as_json:
        facts = {"images": proof.images, "differing": proof.differing}
        accuracy = {"torch_top1": proof.torch_top1, "onnx_top1": proof.onnx_top1}
        written = {"bundle": str(made.folder), "parity": proof.parity.to_dict()}
        added: dict[str, Any] = {} if engine is None else {"engine": engine}
        if proof.judgement is not None:
            added |= {"precision": precision, "gate": proof.judgement.to_dict()}
        emit({**written, **facts, **accuracy, "early_exit": exits, **added})


def _fusion_target(
    level: str | None, backend: str | None, device: str | None, batches: str | None, threads: int | None
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

    check_backend(backend or "onnxruntime")
    return Target(backend or "onnxruntime", device or "cpu", threads, tuple(batch_sizes(batches or "1")))


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
    console_for(as_json).print(
        f"Engine {made.file}: {flavour} {record.version}, {record.precision}, {record.engine_bytes / 1e6:,.2f} MB, "
        f"built in {record.build_seconds:,.1f} s. Next: rkd-deploy bench {made.file} --backend {flavour}"
    )
    return {**{key: value for key, value in record.to_dict().items() if key != "layers"}, "file": str(made.file)}

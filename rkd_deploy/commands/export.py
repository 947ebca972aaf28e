"""The command export: from a run to a bundle, an engine or a model repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.commands.app_formats import APP_FORMATS, require_libraries, write_app
from rkd_deploy.commands.options import RUNS, Json, Root, batch_sizes, console_for, one_of, print_json, require_all
from rkd_deploy.commands.proof import print_proof, proof_facts
from rkd_deploy.commands.repositories import write_ovms, write_triton
from rkd_deploy.commands.settings import SettingsOptions, changed_options, with_settings
from rkd_deploy.errors import UsageError, command_line

if TYPE_CHECKING:
    from rkd_deploy.backends.tensorrt.settings import EngineSettings
    from rkd_deploy.export.levels import Target
    from rkd_deploy.export.precision.options import PrecisionOptions
    from rkd_deploy.serve.triton.settings import Serving

EXPORT_FORMATS = ("onnx", "tensorrt", "tensorrt-rtx", "triton", "ovms", *APP_FORMATS)
REPOSITORIES = ("triton", "ovms")

# Help panels: they also say which options a format, or a model that is exported already, has no use for.
BUNDLE = "The bundle of a run"
AUTO_PANEL = "Where --fuse auto measures"
PRECISION = "Precision below float32"
ENGINE = "Engine (--format tensorrt, tensorrt-rtx)"
TRITON = "Model repository (--format triton; of ovms name, place and address)"

_UNUSED = {
    "onnx": {ENGINE: "builds no engine", TRITON: "writes no model repository"},
    "tensorrt": {TRITON: "writes no model repository"},
    "tensorrt-rtx": {TRITON: "writes no model repository"},
    "triton": {ENGINE: "builds no engine"},
    "ovms": {ENGINE: "builds no engine", TRITON: "has a configuration of its own"},
    **{name: {ENGINE: "builds no engine", TRITON: "writes no model repository"} for name in APP_FORMATS},
}
"""By format: the panels whose options have no effect, and why."""

_OF_OVMS = ("--repository", "--model-name", "--storage-uri")
"""Options of Triton's panel that hold for OpenVINO Model Server too."""


def check_options(output_format: str, changed: dict[str, str | None], *, of_model: bool) -> None:
    """Refuse options that have no effect, by the names that were typed.

    Args:
        output_format: One of `EXPORT_FORMATS`.
        changed: Options that differ from their defaults, with their panels (`changed_options`).
        of_model: Whether a model is given that is exported already, of which no bundle is made.

    Raises:
        UsageError: There are some; the message names all of them.
    """
    for panel, why in _UNUSED[output_format].items():
        known = _OF_OVMS if output_format == "ovms" else ()
        if unused := [flag for flag, its_panel in changed.items() if its_panel == panel and flag not in known]:
            raise UsageError(
                f"--format {output_format} {why}, and has no use for {', '.join(unused)}. Leave it out, or give "
                "another --format."
            )
    if of_model:
        unused = [flag for flag, its_panel in changed.items() if its_panel in (BUNDLE, AUTO_PANEL, PRECISION)]
        if output_format in REPOSITORIES:  # Triton's copies have threads, and the folder is --repository
            threads = () if output_format == "ovms" else ("--threads",)
            unused = [flag for flag in unused if flag not in threads] + [flag for flag in changed if flag == "--output"]
        if unused:
            raise UsageError(
                f"A model that is exported already is what it is, and has no use for {', '.join(unused)}: export a run."
            )


def engine_settings(output_format: str, options: SettingsOptions[EngineSettings]) -> EngineSettings | None:
    """How to build the engine; None for a format that is no engine.

    Raises:
        RkdError: What is asked for cannot be built here; found before minutes of exporting, not after.
    """
    if output_format in ("onnx", *REPOSITORIES, *APP_FORMATS):
        return None
    from rkd_deploy.backends.tensorrt.build import gpu_to_build_on
    from rkd_deploy.backends.tensorrt.settings import load_library

    settings, library = options.make(), load_library(output_format)
    settings.check(library)
    gpu_to_build_on(library)
    return settings


def add_engine(
    model: Path, library: str, settings: EngineSettings | None, output: Path | None, as_json: bool
) -> dict[str, Any]:
    """Build an engine where one was asked for; what is known of it, for --json."""
    if settings is None:
        return {}
    from rkd_deploy.backends.tensorrt.cache import export_engine
    from rkd_deploy.commands.options import status

    with status(f"Building the {library} engine of {model}") as update:
        built = export_engine(model, library, settings, output=output, progress=update)
    record = built.record
    console_for(as_json).print(
        f"Engine {built.file}: {library} {record.version}, {record.precision}, {record.engine_bytes / 1e6:,.2f} MB, "
        f"built in {record.build_seconds:,.1f} s. Next: {command_line('bench', built.file, '--backend', library)}",
        markup=False,
    )
    facts = {key: value for key, value in record.to_dict().items() if key != "layers"}
    return {"engine": {**facts, "file": str(built.file)}}


def _settings() -> dict[str, tuple[type, str]]:
    from rkd_deploy.backends.tensorrt.settings import EngineSettings
    from rkd_deploy.export.precision.options import PrecisionOptions
    from rkd_deploy.serve.triton.settings import Serving

    return {"precision": (PrecisionOptions, PRECISION), "engine": (EngineSettings, ENGINE), "triton": (Serving, TRITON)}


def in_panel(panel: str, *flags: str, **rules: Any) -> Any:
    """A typer option in a help panel."""
    return typer.Option(*flags, rich_help_panel=panel, **rules)


@with_settings(_settings)
def export(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(help="A run; for an engine or Triton a bundle or ONNX file too. Default: the newest run."),
    ] = None,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx; an engine in it (tensorrt, tensorrt-rtx); beside it triton, ovms, transformers-js, executorch.",
        ),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder of the bundle, default bundle in the run; of an engine alone its file, of an app a folder.",
        ),
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
    part: Annotated[
        str | None,
        in_panel(BUNDLE, "--part", help="fused (S + A; default), student (S), s0 (default of a baseline), teacher."),
    ] = None,
    level: Annotated[
        str | None,
        in_panel(
            BUNDLE,
            "--fuse",
            help="tail (adapters and head one matrix), sum, wide, wide-grouped; auto measures. Default: what a budget "
            "of latency was met with, else tail.",
        ),
    ] = None,
    outputs: Annotated[
        str, in_panel(BUNDLE, "--outputs", help="Any of logits,probabilities,features (features need --fuse sum).")
    ] = "logits",
    layout: Annotated[
        str,
        in_panel(BUNDLE, "--input", help="uint8 (NHWC, pre-processing in the graph) or float32 (NCHW, normalised)."),
    ] = "uint8",
    tolerance: Annotated[
        float, in_panel(BUNDLE, "--tolerance", help="Largest difference of a logit from PyTorch's.")
    ] = 1e-4,
    test_images: Annotated[
        bool, in_panel(BUNDLE, "--test-images/--random-images", help="Prove on every test image, or on 64 random ones.")
    ] = True,
    with_pytorch: Annotated[
        bool, in_panel(BUNDLE, "--with-pytorch", help="Write model.pt2 too, for --backend pytorch.")
    ] = False,
    early_exit: Annotated[
        bool,
        in_panel(BUNDLE, "--early-exit", help="Write S and each A as graphs of their own too, and report the saving."),
    ] = False,
    exit_threshold: Annotated[
        float | None,
        in_panel(BUNDLE, "--exit-threshold", help="Confidence at which an image leaves. Default: by held-out images."),
    ] = None,
    backend: Annotated[
        str | None, in_panel(AUTO_PANEL, "--backend", help="Default: onnxruntime, or that of --target.")
    ] = None,
    device: Annotated[str | None, in_panel(AUTO_PANEL, "--device", help="Default: the backend's.")] = None,
    batches: Annotated[
        str | None, in_panel(AUTO_PANEL, "--batch", help="All count alike, e.g. 1,8. Default: 1.")
    ] = None,
    threads: Annotated[
        int | None, in_panel(AUTO_PANEL, "--threads", help="CPU threads; also of a Triton instance.")
    ] = None,
    *,
    precision: SettingsOptions[PrecisionOptions],
    engine: SettingsOptions[EngineSettings],
    repository: Annotated[
        Path | None, in_panel(TRITON, "--repository", help="Its folder. Default: triton or ovms beside the bundle.")
    ] = None,
    triton: SettingsOptions[Serving],
) -> None:
    """Fuse, export and prove a run.

    Default: the newest run. What is written is a bundle, proven against PyTorch; on request an engine in it, or beside
    it a model repository for Triton or OpenVINO Model Server, or what an app loads.
    """
    one_of("format", output_format, EXPORT_FORMATS)
    one_of("input", layout, ("uint8", "float32"))
    of_model = output_format != "onnx" and run is not None and _is_model(run)
    changed = changed_options(context)
    check_options(output_format, changed, of_model=of_model)
    settings, serving = engine_settings(output_format, engine), None
    require_libraries(output_format)
    if output_format in REPOSITORIES:
        require_all("export", "onnx")
        serving = triton.make(threads=threads if output_format == "triton" else None)

    def _add(model: Path) -> dict[str, Any]:
        """What the format asks for beside the ONNX file; what is known of it, for --json."""
        if serving is not None:
            write = write_ovms if output_format == "ovms" else write_triton
            return write(model, repository, serving, as_json)
        if output_format in APP_FORMATS:
            return write_app(output_format, model, output if of_model else None, as_json)
        return add_engine(model, output_format, settings, output if of_model else None, as_json)

    if of_model:
        assert run is not None
        outcome = _add(run)
        if as_json:
            print_json(outcome)
        return
    require_all("export", "torch", "safetensors", "onnx", "onnxscript")
    from rkd_deploy.commands.options import status
    from rkd_deploy.pipeline import export_run, standing_bundle
    from rkd_deploy.train.runs import newest_run, open_run

    source = newest_run(root, finished=True) if run is None else open_run(run)
    of_bundle = [
        flag for flag, panel in changed.items() if panel in (BUNDLE, AUTO_PANEL, PRECISION) and flag != "--threads"
    ]
    # A bundle that stands is taken as it is only where nothing was asked for that could make another one.
    usual = output is None and not of_bundle
    with_pytorch = with_pytorch or output_format == "executorch"  # which begins with that file
    lower = precision.make()
    # With Triton, --threads are those of an instance, unless --fuse auto measures too.
    measuring_threads = None if output_format == "triton" and level != "auto" else threads
    target = _fusion_target(level, backend, device, batches, measuring_threads, lower)
    standing = standing_bundle(source) if usual and output_format != "onnx" else None
    if standing is not None and (output_format != "executorch" or (standing / "model.pt2").is_file()):
        console_for(as_json).print(f"Bundle {standing} is of these weights and options, and is taken as it is.")
        outcome = _add(standing)
        if as_json:
            print_json({"bundle": str(standing), "reused": True} | outcome)
        return
    if serving is not None and serving.backend == "tensorrt":
        raise UsageError(
            "--triton-backend tensorrt serves the plan in a bundle, and a bundle exported just now has none. Build it "
            "first, with --format tensorrt, where the server's TensorRT and GPU are; then give that bundle here."
        )
    with status(f"Exporting {part or 'the network'} of {source.folder}") as update:
        exported = export_run(
            source,
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
            target=target,
            progress=update,
            note=update,
            precision=lower,
        )
    print_proof(exported, lower.precision, as_json)
    outcome = _add(exported.folder)
    if as_json:
        print_json(proof_facts(exported, lower.precision) | outcome)


def _fusion_target(
    level: str | None,
    backend: str | None,
    device: str | None,
    batches: str | None,
    threads: int | None,
    precision: PrecisionOptions,
) -> Target | None:
    """What --fuse auto measures on; None for a level that is not measured."""
    place = {"--backend": backend, "--device": device, "--batch": batches, "--threads": threads}
    if level != "auto":
        for option, value in place.items():
            if value is not None:
                raise UsageError(
                    f"{option} {value} says what --fuse auto measures on; --fuse {level or 'tail'} measures nothing."
                )
        return None
    from rkd_deploy.backends import RunOn, check_backend
    from rkd_deploy.export.levels import Target

    chosen = backend or (precision.runs_on[0] if precision.is_lower else "onnxruntime")
    check_backend(chosen)
    return Target(RunOn(chosen, device=device, threads=threads), tuple(batch_sizes(batches or "1")))


def _is_model(path: Path) -> bool:
    from rkd_deploy.backends.files import ONNX_NAME

    return path.suffix == ".onnx" or (path / ONNX_NAME).exists()

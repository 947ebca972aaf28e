"""Export --format triton: its options, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.commands.options import console_for, need, whole
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.export.triton.settings import Serving

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
    from rkd_deploy.export.triton.settings import Instances, Serving

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
    from rkd_deploy.export.triton.repository import export_triton
    from rkd_deploy.export.triton.settings import STORAGE_URI
    from rkd_deploy.serve.files import model_path

    folder = model_path(model).parent
    beside = (folder.resolve() if folder.name in ("", "..") else folder).with_name("triton")
    written = export_triton(model, repository or beside, serving)
    console = console_for(as_json)
    console.print(f"Model repository {written.repository}: {written.name}, version {written.version}.")
    for file in written.kept:
        console.print(f"Kept as it was: {file}")
    if serving.storage_uri == STORAGE_URI and written.service not in written.kept:
        console.print(f"For KServe, replace {STORAGE_URI} in {written.service}, or give --storage-uri.")
    console.print(f"Next: tritonserver --model-repository={written.repository}")
    facts = {"name": written.name, "version": written.version, "kept": [str(file) for file in written.kept]}
    return {"triton": {"repository": str(written.repository), "service": str(written.service), **facts}}

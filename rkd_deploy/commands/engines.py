"""Engines by the command line: what is asked of one, and building it beside its ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.commands.options import console_for
from rkd_deploy.errors import UsageError

if TYPE_CHECKING:
    from rkd_deploy.serve.engines.settings import EngineSettings


def engine_settings(output_format: str, **given: Any) -> EngineSettings | None:
    """None for a format that is no engine, which none of these options then fits."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if output_format in ("onnx", "triton"):
        if chosen:
            named = ", ".join(sorted(name.replace("_", " ") for name in chosen))
            raise UsageError(f"--format {output_format} builds no engine, and has no use for: {named}. Leave it out.")
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


def add_engine(
    model: Path, flavour: str, settings: EngineSettings | None, output: Path | None, as_json: bool
) -> dict[str, Any]:
    """Build an engine where one was asked for; what is known of it, for --json."""
    if settings is None:
        return {}
    from rkd_deploy.export.engine import export_engine
    from rkd_deploy.serve.bench.display import status

    with status(f"Building the {flavour} engine of {model}") as update:
        made = export_engine(model, flavour, settings, output=output, progress=update)
    record = made.record
    console_for(as_json).print(
        f"Engine {made.file}: {flavour} {record.version}, {record.precision}, {record.engine_bytes / 1e6:,.2f} MB, "
        f"built in {record.build_seconds:,.1f} s. Next: rkd-deploy bench {made.file} --backend {flavour}"
    )
    facts = {key: value for key, value in record.to_dict().items() if key != "layers"}
    return {"engine": {**facts, "file": str(made.file)}}

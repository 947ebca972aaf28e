"""The formats of the command export for apps: a folder for Transformers.js, a program for ExecuTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rkd_deploy.commands.options import console_for, require_all, status

APP_FORMATS = ("transformers-js", "executorch")


def require_libraries(output_format: str) -> None:
    """Check that what a format needs is installed, before anything is exported."""
    if output_format == "transformers-js":
        require_all("export", "onnx")
    elif output_format == "executorch":
        require_all("executorch", "torch", "executorch")


def write_app(output_format: str, model: Path, output: Path | None, as_json: bool) -> dict[str, Any]:
    """Write a bundle for an app, and say so; what is known of it, for --json."""
    from rkd_deploy.backends.files import model_path

    bundle = model_path(model).parent
    beside = bundle.resolve() if bundle.name in ("", "..") else bundle
    folder = output or beside.with_name(output_format)
    with status(f"Writing {bundle} for {output_format}"):
        if output_format == "transformers-js":
            from rkd_deploy.export.transformers_js import export_transformers_js

            parity = export_transformers_js(bundle, folder)
        else:
            from rkd_deploy.export.executorch import export_executorch

            parity = export_executorch(bundle, folder)
    console_for(as_json).print(
        f"{folder} is proven: logits differ from the bundle's by at most {parity.max_abs_diff:.2g} "
        f"(tolerance {parity.tolerance:g}) over {parity.n} inputs. docs/guides/embedding.md says how an app loads it."
    )
    return {output_format: {"folder": str(folder), "parity": parity.to_dict()}}

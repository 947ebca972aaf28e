"""Writes a model repository, for Triton or OpenVINO Model Server, and says what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.commands.options import console_for

if TYPE_CHECKING:
    from rkd_deploy.serve.triton.settings import Serving


def write_triton(model: Path, repository: Path | None, serving: Serving, as_json: bool) -> dict[str, Any]:
    """Write a bundle or an ONNX file as the next version, and say so; what is known of it, for --json."""
    from rkd_deploy.serve.triton.repository import export_triton
    from rkd_deploy.serve.triton.settings import STORAGE_URI

    written = export_triton(model, repository or _beside(model, "triton"), serving)
    console = console_for(as_json)
    console.print(f"Model repository {written.repository}: {written.name}, version {written.version}.")
    for file in written.unchanged:
        console.print(f"Kept as it was: {file}")
    if serving.storage_uri == STORAGE_URI and written.service not in written.unchanged:
        console.print(f"For KServe, replace {STORAGE_URI} in {written.service}, or give --storage-uri.")
    console.print(f"Next: {shlex.join(['tritonserver', f'--model-repository={written.repository}'])}", markup=False)
    facts = {"name": written.name, "version": written.version, "kept": [str(file) for file in written.unchanged]}
    return {"triton": {"repository": str(written.repository), "service": str(written.service), **facts}}


def write_ovms(model: Path, repository: Path | None, serving: Serving, as_json: bool) -> dict[str, Any]:
    """Write a bundle or an ONNX file for OpenVINO Model Server, and say so; what is known of it, for --json."""
    from rkd_deploy.serve.ovms import OVMS_CONFIG, export_ovms
    from rkd_deploy.serve.triton.settings import STORAGE_URI

    written = export_ovms(model, repository or _beside(model, "ovms"), serving)
    console = console_for(as_json)
    console.print(f"Model repository {written.repository}: {written.name}, version {written.version}.")
    if serving.storage_uri == STORAGE_URI:
        console.print(f"For KServe, replace {STORAGE_URI} in {written.service}, or give --storage-uri.")
    config = (written.repository / OVMS_CONFIG).resolve()
    console.print(f"Next: {shlex.join(['ovms', '--config_path', str(config), '--rest_port', '8000'])}", markup=False)
    facts = {"name": written.name, "version": written.version}
    return {"ovms": {"repository": str(written.repository), "service": str(written.service), **facts}}


def _beside(model: Path, name: str) -> Path:
    """A folder of that name beside the folder that a model lies in."""
    from rkd_deploy.backends.files import model_path

    folder = model_path(model).parent
    return (folder.resolve() if folder.name in ("", "..") else folder).with_name(name)

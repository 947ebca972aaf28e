"""An engine beside its ONNX file: what `rkd-deploy export --format tensorrt` writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.errors import StorageError
from rkd_deploy.serve.checksums import reseal
from rkd_deploy.serve.engines.build import build_engine
from rkd_deploy.serve.engines.progress import Progress
from rkd_deploy.serve.engines.record import EngineRecord, engine_path, record_path, write_engine
from rkd_deploy.serve.engines.settings import EngineSettings
from rkd_deploy.serve.files import ONNX_NAME, model_path


@dataclass(frozen=True)
class ExportedEngine:
    """An engine on disk, and what is known of it."""

    file: Path
    record: EngineRecord


def export_engine(
    path: str | os.PathLike[str],
    flavour: str = "tensorrt",
    settings: EngineSettings | None = None,
    *,
    output: Path | None = None,
    device: int = 0,
    progress: Progress | None = None,
) -> ExportedEngine:
    """Build an engine and write it with its JSON record; nothing is written before the build has ended well.

    The file is the library's own bytes: trtexec --loadEngine and Triton take it as it is. In a bundle its checksum and
    that of the record are added to model.json's.

    Args:
        path: Bundle folder or ONNX file; its precision is the engine's.
        flavour: tensorrt or tensorrt-rtx.
        settings: Batch sizes, devices, compatibility.
        output: The engine's file. Default: model.FLAVOUR.engine beside the ONNX file. An engine of ours that is
            there already is replaced.
        device: Index of the GPU to build on.
        progress: Told the phase, and how far it is.

    Raises:
        StorageError: Something that is no engine of ours is there, or it could not be written.
        RkdError: As `rkd_deploy.serve.engines.build.build_engine` raises.
    """
    model = model_path(path)
    file = output or engine_path(model, flavour)
    if file.exists() and not record_path(file).is_file():
        raise StorageError(
            f"{file} exists already and is no engine that rkd-deploy wrote ({record_path(file).name} is not beside "
            "it). Name another file with --output, or remove it first."
        )
    engine = build_engine(path, flavour, settings, device=device, progress=progress)
    names = (file.name, record_path(file).name)
    in_bundle = model.name == ONNX_NAME and file.parent.resolve() == model.parent.resolve()
    if in_bundle and file.exists():
        reseal(model.parent, without=names)  # first: no engine ever lies beside the sum of another
    write_engine(file, engine.plan, engine.record)
    if in_bundle:
        reseal(model.parent, adding=names)
    return ExportedEngine(file, engine.record)

"""Keeps engines on disk: those built on the way to a run, and those that are exported."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.backends.files import ONNX_NAME, model_path, update_checksums
from rkd_deploy.backends.protocol import Progress
from rkd_deploy.backends.tensorrt.build import build_engine
from rkd_deploy.backends.tensorrt.cuda import Gpu
from rkd_deploy.backends.tensorrt.record import EngineRecord, engine_path, read_engine, record_path, write_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Library
from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.errors import ModelFileError, StorageError
from rkd_deploy.storage import new_folder

ENGINE_NAME = "model.engine"
VARIABLE = "RKD_DEPLOY_CACHE"


@dataclass(frozen=True)
class CachedEngine:
    """An engine of the cache, found there or built just now."""

    file: Path
    plan: bytes
    record: EngineRecord
    built: bool
    """Whether it was built just now."""


def cache_folder() -> Path:
    """Folder of the cached engines: RKD_DEPLOY_CACHE, else the user's cache. Removing it costs new builds only."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen) / "engines"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkd-deploy" / "engines"


def cached_engine(
    path: str | os.PathLike[str],
    library: Library,
    gpu: Gpu,
    settings: EngineSettings,
    progress: Progress | None = None,
) -> CachedEngine:
    """The engine of an ONNX file for this GPU: from the cache, or built now and put there.

    Args:
        path: Bundle folder or ONNX file.
        library: What builds it.
        gpu: The GPU it is for.
        settings: How; an engine for other profiles is another engine.
        progress: Called with the phase of the build, and how far it is.

    Raises:
        StorageError: The engine could not be written to the cache.
    """
    source = read_source(path)
    chosen = settings.to_dict()
    if source.fixed_batch:  # the profiles have no effect, and must not ask for a second engine
        del chosen["profiles"]
    key = {
        "onnx": source.sha256,
        "flavour": library.name,
        "version": library.version,
        "gpu": gpu.name,
        "capability": gpu.capability,
        "driver": gpu.driver,
        "settings": chosen,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / f"{library.name}-{digest[:24]}"
    cached = _read(folder)
    if cached is not None:
        return cached
    engine = build_engine(path, library.name, settings, device=gpu.index, progress=progress)
    try:
        with new_folder(folder) as temporary:
            write_engine(temporary / ENGINE_NAME, engine.plan, engine.record)
    except StorageError:
        cached = _read(folder)
        if cached is None:
            raise
        return cached  # another process built the same one meanwhile: it is as good
    return CachedEngine(folder / ENGINE_NAME, engine.plan, engine.record, True)


def _read(folder: Path) -> CachedEngine | None:
    """The engine in a folder of the cache; a damaged one is thrown away, because it can be built again."""
    file = folder / ENGINE_NAME
    if not folder.exists():
        return None
    try:
        plan, record = read_engine(file)
    except ModelFileError:
        record = None
    if record is None:
        shutil.rmtree(folder)
        return None
    return CachedEngine(file, plan, record, False)


@dataclass(frozen=True)
class ExportedEngine:
    """An engine on disk, and what is known of it."""

    file: Path
    record: EngineRecord


def export_engine(
    path: str | os.PathLike[str],
    library: str = "tensorrt",
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
        library: tensorrt or tensorrt-rtx.
        settings: Batch sizes, devices, compatibility.
        output: The engine's file. Default: model.LIBRARY.engine beside the ONNX file. An engine of ours that is
            there already is replaced.
        device: Index of the GPU to build on.
        progress: Called with the phase of the build, and how far it is.

    Raises:
        StorageError: Something that is no engine of ours is there, or it could not be written.
        RkdError: As `build_engine` raises it.
    """
    model = model_path(path)
    file = output or engine_path(model, library)
    if file.exists() and not record_path(file).is_file():
        raise StorageError(
            f"{file} exists already and is no engine that rkd-deploy wrote ({record_path(file).name} is not beside "
            "it). Name another file with --output, or remove it first."
        )
    engine = build_engine(path, library, settings, device=device, progress=progress)
    names = (file.name, record_path(file).name)
    in_bundle = model.name == ONNX_NAME and file.parent.resolve() == model.parent.resolve()
    if in_bundle and file.exists():
        update_checksums(model.parent, without=names)  # first: no engine ever lies beside the sum of another
    write_engine(file, engine.plan, engine.record)
    if in_bundle:
        update_checksums(model.parent, adding=names)
    return ExportedEngine(file, engine.record)

"""Engines that were built on the way to running an ONNX file, kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.errors import ModelFileError, StorageError
from rkd_deploy.serve.backends.cuda import Gpu
from rkd_deploy.serve.engines.build import build_engine
from rkd_deploy.serve.engines.flavours import Flavour
from rkd_deploy.serve.engines.progress import Progress
from rkd_deploy.serve.engines.record import EngineRecord, read_engine, write_engine
from rkd_deploy.serve.engines.settings import EngineSettings
from rkd_deploy.serve.engines.source import read_source
from rkd_deploy.storage import new_folder

ENGINE_NAME = "model.engine"
VARIABLE = "RKD_DEPLOY_CACHE"


@dataclass(frozen=True)
class Kept:
    """An engine from the cache."""

    file: Path
    plan: bytes
    record: EngineRecord
    built: bool
    """Whether it was built just now."""


def cache_folder() -> Path:
    """Where engines are kept: RKD_DEPLOY_CACHE, else the user's cache folder. Removing it costs new builds only."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen) / "engines"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkd-deploy" / "engines"


def cached_engine(
    path: str | os.PathLike[str],
    library: Flavour,
    gpu: Gpu,
    settings: EngineSettings,
    progress: Progress | None = None,
) -> Kept:
    """The engine of an ONNX file for this GPU: kept from an earlier time, or built now and kept.

    Args:
        path: Bundle folder or ONNX file.
        library: Which builds it.
        gpu: For which.
        settings: How; an engine that was kept for other profiles is another engine.
        progress: Told how far the build is.

    Raises:
        StorageError: The engine could not be kept.
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
    kept = _read(folder)
    if kept is not None:
        return kept
    engine = build_engine(path, library.name, settings, device=gpu.index, progress=progress)
    try:
        with new_folder(folder) as temporary:
            write_engine(temporary / ENGINE_NAME, engine.plan, engine.record)
    except StorageError:
        kept = _read(folder)
        if kept is None:
            raise
        return kept  # another process built the same one meanwhile: it is as good
    return Kept(folder / ENGINE_NAME, engine.plan, engine.record, True)


def _read(folder: Path) -> Kept | None:
    """What is kept there; a damaged engine is thrown away, because it can be built again."""
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
    return Kept(file, plan, record, False)

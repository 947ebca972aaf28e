"""New weights for a built engine, without a new build."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from rkd_deploy.backends.tensorrt.build import Engine, read_source
from rkd_deploy.backends.tensorrt.cuda import find_gpu
from rkd_deploy.backends.tensorrt.record import read_engine
from rkd_deploy.backends.tensorrt.settings import load_flavour
from rkd_deploy.errors import BackendError, UsageError


def refit_engine(engine: str | os.PathLike[str], path: str | os.PathLike[str], *, device: int = 0) -> Engine:
    """Put the weights of an ONNX file of the same graph into an engine that was built with `refit`.

    Args:
        engine: The engine file, with its record beside it.
        path: Bundle folder or ONNX file with the new weights.
        device: Index of the GPU.

    Returns:
        The engine with the new weights; nothing is written.

    Raises:
        UsageError: The engine has no record, or was built without `refit`.
        BackendError: The graphs differ, or the engine is another GPU's or version's.
        ModelFileError: One of the files is missing or corrupt.
    """
    plan, record = read_engine(engine)
    if record is None or not record.settings.get("refit"):
        raise UsageError(
            f"{Path(engine)} was not built to have its weights replaced. Build it with refit: "
            "rkd-deploy export MODEL --format tensorrt --refit"
        )
    library = load_flavour(record.flavour)
    gpu = find_gpu(device)
    assert gpu is not None
    record.check_fits(library, gpu.name, gpu.capability)
    source = read_source(path)
    library.messages.clear()
    trt = library.trt
    runtime = trt.Runtime(library.log)
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        raise BackendError(f"{Path(engine)} cannot be loaded on {gpu.name}: {library.drain()}.")
    refitter = trt.Refitter(loaded, library.log)
    weights = trt.OnnxParserRefitter(refitter, library.log)
    if not weights.refit_from_bytes(source.content) or not refitter.refit_cuda_engine():
        raise BackendError(
            f"The weights of {source.file} do not fit {Path(engine)}: {library.drain()}. Both must be exports of one "
            "network with the same settings; build a new engine otherwise."
        )
    content = bytes(loaded.serialize())
    return Engine(
        content,
        dataclasses.replace(
            record,
            onnx_name=source.file.name,
            onnx_sha256=source.sha256,
            precision=source.precision,
            metadata=source.metadata,
            engine_sha256=hashlib.sha256(content).hexdigest(),
            engine_bytes=len(content),
        ),
    )

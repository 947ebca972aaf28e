"""Runs a model file: several runtimes behind one small protocol, `Backend`.

No runtime's file imports another's, and each is imported by name when it is asked for: an app needs one library alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rkd_deploy.backends.files import check_files, model_path, read_card
from rkd_deploy.backends.protocol import Array, Backend, infer_many
from rkd_deploy.backends.runtimes import (
    ENGINE_BACKENDS,
    BackendStatus,
    RunOn,
    available,
    check_backend,
    default_device,
)
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import ModelFileError

__all__ = [
    "ENGINE_BACKENDS",
    "Array",
    "Backend",
    "BackendStatus",
    "RunOn",
    "available",
    "check_backend",
    "default_device",
    "infer_many",
    "load_backend",
    "model_path",
]


def load_backend(
    name: str,
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    cuda_graph: bool = True,
    batches: Sequence[int] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Backend:
    """Load a model to run it; short for ``RunOn(name, ...).load(path, ...)``.

    Args:
        name: As `RunOn.backend`: onnxruntime, pytorch, openvino, tensorrt, tensorrt-rtx, or another way to run one.
        path: Bundle folder, an .onnx file, or, for the two TensorRTs, an engine.
        device: As `RunOn.device`.
        threads: As `RunOn.threads`.
        memory_limit: As `RunOn.memory_limit`.
        cuda_graph: As `RunOn.cuda_graph`.
        batches: As for `RunOn.load`.
        progress: As for `RunOn.load`.

    Raises:
        UsageError: As `RunOn` raises it, or an engine that does not take the batches.
        MissingDependencyError: The backend's library is not installed.
        BackendError: The backend cannot run here, or not on the device asked for.
        ModelFileError: The model file is missing or corrupt.
    """
    run_on = RunOn(name, device=device, threads=threads, memory_limit=memory_limit, cuda_graph=cuda_graph)
    return run_on.load(path, batches=batches, progress=progress)


def describe_model(path: Path) -> ModelCard:
    """The card of a bundle or an ONNX file.

    Raises:
        ModelFileError: The model is missing or corrupt, or has no card; a file of the bundle is not as it was written.
        MissingDependencyError: Only the ONNX file is there, and no onnxruntime to read it.
    """
    file = model_path(path)
    check_files(path, complete=True)
    metadata = {}
    if not file.with_suffix(".json").exists():
        with RunOn().load(file) as backend:
            metadata = dict(backend.info.metadata)
    card = read_card(file, metadata)
    if card is None:
        raise ModelFileError(f"{file} has no model card: it was not written by rkd-deploy export.")
    return card

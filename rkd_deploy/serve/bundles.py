"""Finding bundles and reading what they say of themselves."""

from __future__ import annotations

from pathlib import Path

from rkd_deploy.card import ModelCard
from rkd_deploy.errors import ModelFileError
from rkd_deploy.serve.backends import load_backend
from rkd_deploy.serve.checksums import check_files
from rkd_deploy.serve.files import model_path, read_card


def newest_bundle(root: Path) -> Path:
    """The bundle that was written last in any run.

    Args:
        root: Folder of runs.

    Raises:
        ModelFileError: There is none; the message says how to get one.
    """
    cards = list(root.glob("*/bundle*/model.json"))
    if not cards:
        raise ModelFileError(f"There is no bundle in {root}/. Make one with: rkd-deploy train && rkd-deploy export")
    return max(cards, key=lambda path: path.stat().st_mtime_ns).parent


def describe(path: Path) -> ModelCard:
    """The card of a bundle or an ONNX file.

    Raises:
        ModelFileError: The model is missing or corrupt, or has no card; a file of the bundle is not as it was written.
        MissingDependencyError: Only the ONNX file is there, and no onnxruntime to read it.
    """
    file = model_path(path)
    check_files(path, complete=True)
    metadata = {}
    if not file.with_suffix(".json").exists():
        with load_backend("onnxruntime", file) as backend:
            metadata = dict(backend.metadata())
    card = read_card(file, metadata)
    if card is None:
        raise ModelFileError(f"{file} has no model card: it was not written by rkd-deploy export.")
    return card

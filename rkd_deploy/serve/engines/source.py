"""Reading the ONNX file that an engine is built from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.errors import ModelFileError, require
from rkd_deploy.serve.checksums import check_files
from rkd_deploy.serve.files import broken_model, model_path


@dataclass(frozen=True)
class Source:
    """An ONNX model in memory, its weights inside."""

    file: Path
    content: bytes
    """What the parser is given. TensorRT gets no path: it can open no other file."""
    sha256: str
    """Of `content`: the file's own where its weights are inside it."""
    metadata: dict[str, str]
    card: ModelCard | None
    fixed_batch: bool
    """Whether the file itself fixes the batch, so that an engine has no choice of profiles."""

    @property
    def precision(self) -> str:
        """As the card says; the builder is told none, because it takes every type from the file."""
        return "unknown" if self.card is None else self.card.precision


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read an ONNX file, and the files that it keeps weights in, which must lie in its own folder.

    Args:
        path: Bundle folder or ONNX file.

    Raises:
        ModelFileError: Missing, corrupt, weights outside of the folder, a card in a newer schema, or a file of the
            bundle that is not as it was written.
        MissingDependencyError: onnx is not installed.
    """
    file = model_path(path)
    check_files(path, complete=False)
    onnx = require("onnx", "export")
    content = file.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions have no other base
        raise broken_model(file, " ".join(str(error).split())) from error
    inside = model.ByteSize()
    try:
        onnx.load_external_data_for_model(model, str(file.parent))  # refuses paths and links that leave the folder
    except Exception as error:  # onnx's own, the file system's, and those of broken numbers
        raise ModelFileError(
            f"The weights that {file} keeps in other files cannot be read: {' '.join(str(error).split()).rstrip('.')}. "
            "They must lie in the same folder: copy them there, or save the model with its weights inside."
        ) from error
    if model.ByteSize() != inside:
        content = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise broken_model(file, " ".join(str(error).split())) from error
    _check_opset(file, onnx, model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    text = metadata.get(METADATA_KEY)
    card = None if text is None else ModelCard.from_json(text, str(file))
    return Source(file, content, hashlib.sha256(content).hexdigest(), metadata, card, _fixed_batch(model.graph))


def _fixed_batch(graph: Any) -> bool:
    constants = {constant.name for constant in graph.initializer}
    shapes = [value.type.tensor_type.shape.dim for value in graph.input if value.name not in constants]
    return all(len(sizes) > 0 and sizes[0].dim_value > 0 for sizes in shapes)


def _check_opset(file: Path, onnx: Any, model: Any) -> None:
    # The parsers take a newer opset for the newest one they know, and would build what the file may not mean.
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=newest)
    if opset > newest:
        raise ModelFileError(
            f"{file} is written in opset {opset}, and onnx {onnx.__version__} knows up to opset {newest}. "
            "Update onnx, or export the model again in an older one (opset_version of torch.onnx.export)."
        )

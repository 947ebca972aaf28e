"""Reads the ONNX file that an engine is built of, and refuses what no engine can be built of."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.backends.files import broken_model, check_files, model_path, too_new
from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.errors import BackendError, ModelFileError, require


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX model in memory, its weights inside."""

    file: Path
    content: bytes
    """The bytes that the parser reads. TensorRT gets no path: it can open no other file."""
    sha256: str
    """SHA-256 of `content`: the file's own where its weights are inside it."""
    metadata: dict[str, str]
    card: ModelCard | None
    fixed_batch: bool
    """Whether the file itself fixes the batch, so that an engine has no choice of profiles."""

    @property
    def precision(self) -> str:
        """Precision that the card names; the builder gets none, because it takes every type from the file."""
        return "unknown" if self.card is None else self.card.precision


def read_source(path: str | os.PathLike[str]) -> OnnxSource:
    """Read an ONNX file, and the files that it keeps weights in, which must lie in its own folder.

    Args:
        path: Bundle folder or ONNX file.

    Raises:
        ModelFileError: Missing, corrupt, weights outside of the folder, a card in a newer schema, or a file of the
            bundle that is not as it was written.
        MissingDependencyError: onnx is not installed.
        BackendError: The file is in a newer opset or format than onnx knows, or has not one numeric input.
    """
    file = model_path(path)
    check_files(path, complete=False)
    onnx = require("onnx", "export")
    content = file.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions have no other base
        raise broken_model(file, " ".join(str(error).split())) from error
    _check_versions(file, onnx, model)
    _check_input(file, onnx, model.graph)
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
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    text = metadata.get(METADATA_KEY)
    card = None if text is None else ModelCard.from_json(text, str(file))
    return OnnxSource(file, content, hashlib.sha256(content).hexdigest(), metadata, card, _fixed_batch(model.graph))


def _fixed_batch(graph: Any) -> bool:
    return all(value.type.tensor_type.shape.dim[0].dim_value > 0 for value in _inputs(graph))


def _inputs(graph: Any) -> list[Any]:
    constants = {constant.name for constant in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _check_input(file: Path, onnx: Any, graph: Any) -> None:
    """Refuse all but one numeric input of known rank: the parsers' own errors, if any, are no help to a user."""
    inputs = _inputs(graph)
    kinds = [onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in inputs]
    described = ", ".join(f"{value.name} {kind.lower()}" for value, kind in zip(inputs, kinds, strict=True)) or "none"
    way_out = "Engines and servers get models with one numeric input, batch first: export the classifier alone."
    if len(inputs) != 1:
        raise BackendError(f"{file} has {len(inputs)} inputs ({described}). {way_out}")
    if kinds[0] in ("STRING", "UNDEFINED"):
        raise BackendError(f"The input of {file} is {described}, no number. {way_out}")
    if not inputs[0].type.tensor_type.shape.dim:
        raise BackendError(f"The input of {file} has no known rank ({described}). {way_out}")


def _check_versions(file: Path, onnx: Any, model: Any) -> None:
    if model.ir_version > onnx.IR_VERSION:
        version, newest = f"ONNX IR version {model.ir_version}", f"version {onnx.IR_VERSION}"
        raise too_new(file, version, "onnx", onnx.__version__, newest)
    # The parsers take a newer opset for the newest one they know, and would build what the file may not mean.
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=newest)
    if opset > newest:
        raise too_new(file, f"opset {opset}", "onnx", onnx.__version__, f"opset {newest}")

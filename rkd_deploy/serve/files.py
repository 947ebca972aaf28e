"""Where a model's files are: a bundle folder or a bare ONNX file, and the card that belongs to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.errors import ModelFileError

ONNX_NAME = "model.onnx"
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


def model_path(path: str | os.PathLike[str]) -> Path:
    """The ONNX file meant by a bundle folder or by a file's own name.

    Raises:
        ModelFileError: There is no such file or folder, the folder holds no model.onnx, or the file is empty.
    """
    given = Path(path)
    file = given / ONNX_NAME if given.is_dir() else given
    try:
        if not file.is_file():
            reason = f"the folder {given} holds no {ONNX_NAME}" if given.is_dir() else f"there is no file {file}"
            raise ModelFileError(
                f"No model to load: {reason}. Name a bundle folder or an .onnx file; rkd-deploy export writes both."
            )
        size = file.stat().st_size
    except OSError as error:
        raise ModelFileError(
            f"{file} cannot be read: {error.strerror}. Name another file or mend its permissions."
        ) from error
    if size == 0:
        raise broken_model(file, "it is empty (0 bytes)")
    return file


def model_name(path: str | os.PathLike[str]) -> str:
    """A short name for a model without a card: its folder's for a bundle, else the file's; never a whole path."""
    file = model_path(path).resolve()
    return file.parent.name if file.name == ONNX_NAME else file.stem


def read_card(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> ModelCard | None:
    """The card of a model: from the metadata inside the file, else from the JSON file of the same name beside it.

    Args:
        path: Bundle folder or ONNX file.
        metadata: What `Backend.metadata` gave for it.

    Returns:
        None where there is no card at all.

    Raises:
        ModelFileError: There is a card and it cannot be read.
    """
    file = model_path(path)
    if METADATA_KEY in metadata:
        return ModelCard.from_json(metadata[METADATA_KEY], str(file))
    beside = file.with_suffix(".json")
    try:
        text = beside.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{beside} cannot be read as a model card: {error}. Export the model again with rkd-deploy export."
        ) from error
    return ModelCard.from_json(text, str(beside))


def broken_model(file: Path, reason: str) -> ModelFileError:
    """The error for a file that is there and holds no model that can be loaded."""
    return ModelFileError(
        f"{file} cannot be loaded as a model: {reason}. Copy the file again if a transfer broke off, "
        "or export the model again with rkd-deploy export."
    )

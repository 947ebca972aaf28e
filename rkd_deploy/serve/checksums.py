"""Whether a bundle's files are the ones that were written: SHA-256 of each, in model.json.

model.json holds its own sum too, taken of its text with zeros in that place. So a change of any byte of any file is
noticed, model.json included. The card inside model.onnx holds no sums: a file cannot hold its own, and the ONNX file is
meant to work alone. Against whoever changes a file and its sum this is no protection: it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rkd_deploy.card import ModelCard
from rkd_deploy.errors import ModelFileError
from rkd_deploy.serve.files import ENGINE_SUFFIXES, ONNX_NAME, model_path
from rkd_deploy.storage import write_text

CARD_NAME = "model.json"
_ZEROS = "0" * 64
_OWN_SUM = re.compile(rf'"{re.escape(CARD_NAME)}": "([0-9a-f]{{64}})"')


def sealed(card: ModelCard, folder: Path) -> str:
    """The text of model.json for a folder that holds every other file of the bundle."""
    sums = {file.name: _sha256(file.read_bytes()) for file in sorted(folder.iterdir()) if file.name != CARD_NAME}
    blank = replace(card, checksums={**sums, CARD_NAME: _ZEROS}).to_json() + "\n"
    return replace(card, checksums={**sums, CARD_NAME: _sha256(blank.encode())}).to_json() + "\n"


def reseal(folder: Path, *, adding: Iterable[str] = (), without: Iterable[str] = ()) -> None:
    """Take files that were written later, an engine and its record, into the sums of a bundle, or out of them.

    Sums of other files stay as they are: what was changed meanwhile is still noticed. A folder without a sealed card is
    left alone.

    Args:
        folder: Of the bundle.
        adding: Names of files in it.
        without: Names that are to have no sum.

    Raises:
        StorageError: model.json could not be written; it is as it was.
    """
    beside = folder / CARD_NAME
    if not beside.is_file() or not (content := json.loads(_text(beside))).get("checksums"):
        return
    sums = {name: found for name, found in content["checksums"].items() if name not in {*without, CARD_NAME}}
    sums |= {name: _sha256(_bytes(folder / name)) for name in adding}
    blank = json.dumps(content | {"checksums": {**dict(sorted(sums.items())), CARD_NAME: _ZEROS}}, indent=2) + "\n"
    write_text(beside, blank.replace(f'"{CARD_NAME}": "{_ZEROS}"', f'"{CARD_NAME}": "{_sha256(blank.encode())}"'))


def check_files(path: str | os.PathLike[str], *, complete: bool) -> dict[str, str]:
    """Compare the files of a bundle with their sums.

    Args:
        path: Bundle folder, or the ONNX file in it. Of an ONNX file alone, and of a bundle without sums, nothing can be
            said.
        complete: Whether every file but engines must be there; else an app may have left some out.

    Returns:
        The sums, by file.

    Raises:
        ModelFileError: A file was changed or is missing; the message names all of them.
    """
    file = model_path(path)
    beside = file.with_name(CARD_NAME)
    if file.name != ONNX_NAME or not beside.is_file():
        return {}
    text = _text(beside)
    sums = dict(ModelCard.from_json(text, str(beside)).checksums)
    own = _OWN_SUM.search(text)
    if own is None and not sums:
        return {}
    changed, missing = [], []
    if own is None or _sha256(text.replace(own[1], _ZEROS).encode()) != own[1]:
        changed.append(CARD_NAME)
    for name in sorted(sums.keys() - {CARD_NAME}):
        if Path(name).name != name:
            raise ModelFileError(
                f"{beside} lists the file {name!r}, which is not in the folder of the bundle: a bundle is one folder. "
                "Export it again with rkd-deploy export."
            )
        if not (found := beside.with_name(name)).is_file():
            if not name.removesuffix(".json").endswith(ENGINE_SUFFIXES):  # which can be built again, and elsewhere must
                missing.append(name)
        elif _sha256(_bytes(found)) != sums[name]:
            changed.append(name)
    if changed or (missing and complete):
        raise _damaged(beside.parent, changed, missing if complete else [])
    return sums


def _damaged(folder: Path, changed: list[str], missing: list[str]) -> ModelFileError:
    found = [f"{', '.join(names)} {what}" for names, what in ((changed, "changed"), (missing, "missing")) if names]
    return ModelFileError(
        f"The bundle {folder} is not as it was written: {'; '.join(found)} (by the checksums in {CARD_NAME}). "
        "Copy it again, or export it again with rkd-deploy export."
    )


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(
            f"{file} cannot be read as a model card: {error}. Copy the bundle again, or export it again."
        ) from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelFileError(
            f"{file} cannot be read: {error.strerror}. Mend its permissions or copy it again."
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

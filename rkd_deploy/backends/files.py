"""Finds the files of a model or a bundle, and proves that they are as they were written.

A bundle's model.json holds the SHA-256 of each file, its own too, taken of its text with zeros in that place. So a
change of any byte of any file is noticed, model.json included. The card inside model.onnx holds no sums: a file cannot
hold its own, and the ONNX file is meant to work alone. Against whoever changes a file and its sum this is no
protection: it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rkd_deploy.card import METADATA_KEY, ModelCard
from rkd_deploy.decoding import parse_object
from rkd_deploy.errors import BackendError, ModelFileError, UsageError
from rkd_deploy.storage import open_regular, read_text, sha256_of, write_text

ONNX_NAME = "model.onnx"
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
PROGRAM_SUFFIX = ".pt2"


def model_path(path: str | os.PathLike[str]) -> Path:
    """The ONNX file meant by a bundle folder or by a file's own name.

    Raises:
        ModelFileError: There is no such file or folder, the folder holds no model.onnx, or the file is empty, may not
            be read, or is no regular file.
        UsageError: It is no path.
    """
    try:
        named = Path(path)
    except TypeError as error:
        raise UsageError(f"A model was given as {type(path).__name__}; it must be a path.") from error
    file = named
    try:
        in_folder = named.is_dir()
        file = named / ONNX_NAME if in_folder else named
        if not os.path.lexists(file):
            reason = f"the folder {named} holds no {ONNX_NAME}" if in_folder else f"there is no file {file}"
            raise ModelFileError(
                f"No model to load: {reason}. Name a bundle folder or an .onnx file; rkd-deploy export writes both."
            )
        with open_regular(file) as stream:  # a runtime would call a pipe, or a file that may not be read, a broken one
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise _unreadable(file, error) from error
    if size == 0:
        raise broken_model(file, "it is empty (0 bytes)")
    return file


def program_path(path: str | os.PathLike[str]) -> Path:
    """The exported program that PyTorch runs, beside the ONNX file or alone in its folder.

    Raises:
        ModelFileError: There is no model.
        BackendError: The model has no exported program.
    """
    folder = Path(path)
    file = folder / f"model{PROGRAM_SUFFIX}" if folder.is_dir() else model_path(path).with_suffix(PROGRAM_SUFFIX)
    try:
        open_regular(file).close()
    except FileNotFoundError as error:
        raise BackendError(
            f"The pytorch backend runs a bundle's exported program, and there is no {file}. "
            "Export it with: rkd-deploy export --with-pytorch"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    return file


def model_name(path: str | os.PathLike[str]) -> str:
    """A short name for a model without a card: its folder's for a bundle, else the file's; never a whole path."""
    file = model_path(path).resolve()
    return file.parent.name if file.name == ONNX_NAME else file.stem


def read_card(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> ModelCard | None:
    """The card of a model: from the metadata inside the file, else from the JSON file of the same name beside it.

    Args:
        path: Bundle folder or ONNX file.
        metadata: `ModelInfo.metadata` of the loaded model.

    Returns:
        None where there is no card at all.

    Raises:
        ModelFileError: There is a card and it cannot be read.
    """
    file = model_path(path)
    # Inside the file first: that card cannot have been left behind, or copied beside another model.
    if METADATA_KEY in metadata:
        return ModelCard.from_json(metadata[METADATA_KEY], str(file))
    beside = file.with_suffix(".json")
    if not os.path.lexists(beside):
        return None
    return ModelCard.from_json(_text(beside), str(beside))


def stated_precision(metadata: Mapping[str, str], file: Path) -> str:
    """The precision that the card inside an ONNX file states; "unknown" where there is no card.

    Raises:
        ModelFileError: The card cannot be read.
    """
    text = metadata.get(METADATA_KEY)
    return ModelCard.from_json(text, str(file)).precision if text else "unknown"


def broken_model(file: Path, reason: str) -> ModelFileError:
    """The error for a file whose content is no model that can be loaded."""
    return ModelFileError(
        f"{file} cannot be loaded as a model: {reason}. Copy the file again if a transfer broke off, "
        "or export the model again with rkd-deploy export."
    )


_SHORTAGES = {
    r"bad_alloc|bad allocation|[Oo]ut of memory|Cannot allocate memory|[Ff]ailed to allocate": "memory ran out",
    r"pthread_create|Resource temporarily unavailable": "no more threads could be started",
    r"Too many open files|system error number 24\b": "no more files could be opened",
}
"""Patterns of what runtimes say where the machine ran out of something, to that something in plain words."""


def failed_load(file: Path, library: str, reason: str) -> ModelFileError | BackendError:
    """The error for a file that a runtime could not load: what the machine lacks, or else that the file is broken.

    Args:
        file: The model.
        library: Name and version of the runtime.
        reason: Why, in the runtime's words.
    """
    for pattern, shortage in _SHORTAGES.items():
        if re.search(pattern, reason):
            return BackendError(
                f"{library} could not load {file}: {shortage} ({reason}). The file may well be whole. Close other "
                "programs, ask for fewer threads or streams, or raise the limit of this process (ulimit -a shows it)."
            )
    return broken_model(file, reason)


CARD_NAME = "model.json"
_ZEROS = "0" * 64
_CARD_SUM = re.compile(rf'"{re.escape(CARD_NAME)}": "([0-9a-f]{{64}})"')


def with_checksums(card: ModelCard, folder: Path) -> str:
    """The text of model.json for a folder that holds every other file of the bundle."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    sums = {name: _sha256_of(file) for name, file in files.items() if name != CARD_NAME}
    # No file can hold its own checksum: the card's is that of its text with zeros in the place of the sum.
    blank = replace(card, checksums={**sums, CARD_NAME: _ZEROS}).to_json() + "\n"
    return replace(card, checksums={**sums, CARD_NAME: _sha256(blank.encode())}).to_json() + "\n"


def update_checksums(folder: Path, *, adding: Iterable[str] = (), without: Iterable[str] = ()) -> None:
    """Add files that were written later, an engine and its record, to a bundle's checksums, or remove some.

    Sums of other files stay as they are: what was changed meanwhile is still noticed. A folder whose card has no
    sums is left alone.

    Args:
        folder: Folder of the bundle.
        adding: Names of files in it.
        without: Names that are to have no sum.

    Raises:
        StorageError: model.json could not be written; it is as it was.
    """
    beside = folder / CARD_NAME
    if not beside.is_file():
        return
    ModelCard.from_json(text := _text(beside), str(beside))
    content = parse_object(text)  # with what a later version may have added to the card
    if not content.get("checksums"):
        return
    sums = {name: checksum for name, checksum in content["checksums"].items() if name not in {*without, CARD_NAME}}
    sums |= {name: _sha256_of(folder / name) for name in adding}
    blank = json.dumps(content | {"checksums": {**dict(sorted(sums.items())), CARD_NAME: _ZEROS}}, indent=2) + "\n"
    write_text(beside, blank.replace(f'"{CARD_NAME}": "{_ZEROS}"', f'"{CARD_NAME}": "{_sha256(blank.encode())}"'))


def check_files(path: str | os.PathLike[str], *, complete: bool) -> dict[str, str]:
    """Compare the files of a bundle with their checksums.

    Args:
        path: Bundle folder, or the ONNX file in it. Of an ONNX file alone, and of a bundle without sums, nothing can be
            said.
        complete: Whether every file but engines must be there; else an app may have left some out.

    Returns:
        The SHA-256 of each file, by its name in the folder of the bundle.

    Raises:
        ModelFileError: A file was changed or is missing; the message names all of them.
    """
    file = model_path(path)
    beside = file.with_name(CARD_NAME)
    if file.name != ONNX_NAME or not beside.is_file():
        return {}
    text = _text(beside)
    sums = dict(ModelCard.from_json(text, str(beside)).checksums)
    card_sum = _CARD_SUM.search(text)
    if card_sum is None and not sums:
        return {}
    changed, missing = [], []
    # By the text, not by what was read of it: keys that this version does not know are covered too.
    if card_sum is None or _sha256(text.replace(card_sum[1], _ZEROS).encode()) != card_sum[1]:
        changed.append(CARD_NAME)
    for name in sorted(sums.keys() - {CARD_NAME}):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ModelFileError(
                f"{beside} lists the file {name!r}, which is not in the folder of the bundle: a bundle is one folder. "
                "Export it again with rkd-deploy export."
            )
        if not (listed := beside.parent / name).is_file():
            if not name.removesuffix(".json").endswith(ENGINE_SUFFIXES):  # which can be built again, and elsewhere must
                missing.append(name)
        elif _sha256_of(listed) != sums[name]:
            changed.append(name)
    if changed or (missing and complete):
        raise _damaged(beside.parent, changed, missing if complete else [])
    return sums


def _damaged(folder: Path, changed: list[str], missing: list[str]) -> ModelFileError:
    damage = [f"{', '.join(names)} {what}" for names, what in ((changed, "changed"), (missing, "missing")) if names]
    return ModelFileError(
        f"The bundle {folder} is not as it was written: {'; '.join(damage)} (by the checksums in {CARD_NAME}). "
        "Copy it again, or export it again with rkd-deploy export."
    )


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise ModelFileError(
            f"{file} cannot be read as a model card: {error}. Copy the bundle again, or export it again."
        ) from error


def _sha256_of(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> ModelFileError:
    way_out = "Mend its permissions or copy it again." if isinstance(error, PermissionError) else "Name another file."
    return ModelFileError(f"{file} cannot be read: {error.strerror}. {way_out}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
    # By the card, which is written last: of two bundles the one that was finished later.
    return max(cards, key=lambda path: path.stat().st_mtime_ns).parent


def too_new(file: Path, written_in: str, library: str, version: str, newest: str) -> BackendError:
    """The error for a file that is newer than the library that is to run it."""
    return BackendError(
        f"{file} is written in {written_in}, and {library} {version} reads up to {newest}. Update {library}, or export "
        "the model again in an older one (opset_version of torch.onnx.export)."
    )

"""Files written whole or not at all: temporary name, fsync, rename.

A reader never sees half a file, and a kill, a full disk or an error in the middle leaves what stood there before.
Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rkd_deploy.errors import StorageError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: It could not be written; a file that was there before is intact.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; a run folder is to be read by others too
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error, needed=len(content)) from error
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def append_bytes(path: Path, content: bytes) -> None:
    """Continue a file inside a `new_folder`, which is what is whole or not at all.

    Raises:
        StorageError: It could not be written.
    """
    try:
        with path.open("ab") as stream:
            stream.write(content)
    except OSError as error:
        raise storage_error(path, error, needed=len(content)) from error


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file whole or not at all (see `write_bytes`)."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON whole or not at all; NaN and infinity are refused, because JSON has neither."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: What the folder is to be.
        replace: Take the place of the folder that lies there, once the block has ended well.

    Raises:
        StorageError: `path` exists already and is not to be replaced, or something could not be written.
    """
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already and is never overwritten. Name another folder, or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(0o777 & ~_umask())
        if replace and path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, StorageError):
            raise
        raise storage_error(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def storage_error(path: Path, error: OSError, needed: int | None = None) -> StorageError:
    """Say what could not be written, why, and how much room there is."""
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), None)
    room = "" if folder is None else f" Free there: {shutil.disk_usage(folder).free:,} bytes"
    room += f", needed: {needed:,}." if room and needed is not None else ("." if room else "")
    return StorageError(
        f"Could not write {path}: {error.strerror or error}.{room} "
        "What stood there before is intact; free some space or name another folder, and run the command again."
    )


def _sync_folder(folder: Path) -> None:
    # The rename itself lives in the directory: without this a power cut can undo it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

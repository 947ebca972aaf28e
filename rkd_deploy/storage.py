"""Files read with a bound, and written whole or not at all: temporary name, fsync, rename.

A reader never sees half a file, and a kill, a full disk or an error in the middle leaves what stood there before. What
somebody else wrote is opened by `open_regular` alone: a named pipe would wait for ever, and /dev/zero never ends.
Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from rkd_deploy.errors import StorageError

try:
    import fcntl

    _LOCKS = True
except ImportError:  # Windows: temporary files of killed processes stay there
    _LOCKS = False

TEXT_LIMIT = 64 * 2**20
"""Bytes of the largest text file that is read: cards, recipes, lists of labels."""
RECORD_LIMIT = 2**30
"""Bytes of the largest record of measurements that is read; it has every sample."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_POINTERS = {
    b"version https://git-lfs.github.com/spec": "a pointer of Git LFS instead of the file; fetch it with: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex instead of the file; fetch it with: git annex get",
}
_LARGEST_POINTER = 1024


def open_regular(path: str | os.PathLike[str], *, limit: int | None = None) -> BufferedReader:
    """Open a file of unknown origin for reading.

    Args:
        path: A regular file, or a link to one.
        limit: Bytes that it may have at most. None: as many as there are, for a caller that does not read them all.

    Raises:
        OSError: There is no such file, it may not be read, it is a pipe, a device, a socket or a folder, a link to
            nothing, a pointer of Git LFS or git-annex, or larger than the limit. `strerror` says which, in words that
            fit after "cannot be read: ".
    """
    try:
        name = os.fspath(path)
    except TypeError as error:
        raise OSError(errno.EINVAL, f"it was given as {type(path).__name__}, and must be a path") from error
    try:
        _check_regular(os.stat(name), name)  # before it is opened: opening alone can rewind a tape
        # A pipe that takes the file's place meanwhile would hold up an open() without O_NONBLOCK.
        stream = os.fdopen(
            os.open(name, os.O_RDONLY | _flag("O_NONBLOCK") | _flag("O_BINARY") | _flag("O_CLOEXEC")), "rb"
        )
    except FileNotFoundError as error:
        if os.path.islink(name):
            target = os.readlink(name)
            raise OSError(errno.ENOENT, f"it is a link to {target}, which is not there", name) from error
        raise
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), name) from error
    try:
        size = _check_regular(os.fstat(stream.fileno()), name)
        if limit is not None and size > limit:
            raise _too_large(name, size, limit)
        if size <= _LARGEST_POINTER:
            head = stream.read(64)
            for beginning, what in _POINTERS.items():
                if head.startswith(beginning):
                    raise OSError(errno.EINVAL, f"it is {what}", name)
            stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream


def read_bytes(path: str | os.PathLike[str], *, limit: int | None = None) -> bytes:
    """The content of a file of unknown origin (see `open_regular` for the errors)."""
    with open_regular(path, limit=limit) as stream:
        if limit is None:
            return stream.read()
        content = stream.read(limit + 1)  # a file of /proc says that it has 0 bytes
        if len(content) > limit:
            raise _too_large(os.fspath(path), len(content), limit)
        return content


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the content of a file, in hexadecimal (see `open_regular` for the errors)."""
    with open_regular(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def read_text(path: str | os.PathLike[str], *, limit: int = TEXT_LIMIT) -> str:
    """The text of a file of unknown origin, with plain line ends and without the mark that Windows puts before UTF-8.

    Raises:
        OSError: As for `open_regular`.
        UnicodeDecodeError: It is not UTF-8.
    """
    text = read_bytes(path, limit=limit).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_regular(status: os.stat_result, name: str) -> int:
    """The size of a regular file in bytes."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}, and must be a regular file", name)
    return status.st_size


def _too_large(name: str, size: int, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {limit:,} are read", name)


def _flag(name: str) -> int:
    return getattr(os, name, 0)  # each is missing on one system or another


@contextmanager
def new_file(path: Path, *, needed: int | None = None) -> Iterator[BinaryIO]:
    """Give a stream to a temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: What the file is to be; a file that is there is replaced.
        needed: Bytes that will be written, where they are known, for the message of a full disk.

    Raises:
        StorageError: It could not be written; a file that was there before is intact.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary, descriptor = _locked_file(path)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; a run folder is to be read by others too
            temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise storage_error(path, error, needed=needed) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all (see `new_file` for the errors)."""
    with new_file(path, needed=len(content)) as stream:
        stream.write(content)


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

    A process that is killed in the block leaves the temporary folder behind; the next that makes `path` removes it.

    Args:
        path: What the folder is to be.
        replace: Take the place of the folder that lies there, once the block has ended well.

    Raises:
        StorageError: `path` exists already and is not to be replaced, or something could not be written.
    """
    if os.path.lexists(path) and not replace:
        raise StorageError(f"{path} exists already and is never overwritten. Name another folder, or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary, lock = _locked_folder(path)
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
            # Moved away, not removed: a kill while a large folder is being removed would leave neither.
            former = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            path.rename(former / path.name)
            temporary.rename(path)
            shutil.rmtree(former)
        else:
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
    finally:
        _close(lock)


def storage_error(path: Path, error: OSError, needed: int | None = None) -> StorageError:
    """Say what could not be written, why, and how much room there is."""
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), None)
    room = "" if folder is None else f" Free there: {shutil.disk_usage(folder).free:,} bytes"
    room += f", needed: {needed:,}." if room and needed is not None else ("." if room else "")
    return StorageError(
        f"Could not write {path}: {error.strerror or error}.{room} "
        "What stood there before is intact; free some space or name another folder, and run the command again."
    )


# A temporary file or folder is locked while its process lives; a kill gives the lock back. Between its creation and its
# lock another process may take it for a leftover and remove it: then the next one is taken.


def _locked_file(path: Path) -> tuple[Path, int]:
    """A temporary file for `path`, and its locked descriptor."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        _lock(descriptor)
        if os.path.lexists(name):
            return Path(name), descriptor
        os.close(descriptor)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A temporary folder for `path`, and the descriptor that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        if not _LOCKS:
            return folder, None
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            _lock(descriptor)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files and folders of `path` that a killed process left: those whose lock nobody holds."""
    if not _LOCKS:
        return
    beginning = f".{path.name}."
    with os.scandir(path.parent) as entries:
        names = [entry.path for entry in entries if entry.name.startswith(beginning) and entry.name.endswith(".tmp")]
    for name in names:
        with suppress(OSError):  # somebody else's, or gone meanwhile; BlockingIOError: its process lives
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(name)
                else:
                    os.unlink(name)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> None:
    if _LOCKS:
        with suppress(OSError):  # a file system without locks; leftovers stay there, since none of them can be locked
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


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

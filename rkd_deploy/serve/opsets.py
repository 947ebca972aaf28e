"""Which operator set an ONNX file is written in, read without onnx, which a device that runs models need not have."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from rkd_deploy.errors import BackendError

_OPSET_IMPORT, _DOMAIN, _VERSION = 8, 1, 2  # field numbers of ModelProto and OperatorSetIdProto
_LENGTHS = {1: 8, 5: 4}  # bytes of the wire types of fixed size

DEFAULT_DOMAINS = (b"", b"ai.onnx")


def opset(file: Path) -> int:
    """The version of ONNX's own operators that a file imports; 0 where it imports none.

    Only the outermost fields are looked at, and the graph and its weights skipped, so it costs the same for any size.

    Args:
        file: An ONNX file that a runtime has read: no other check is made.

    Reference: https://protobuf.dev/programming-guides/encoding, onnx.proto of https://github.com/onnx/onnx
    """
    found = 0
    with file.open("rb") as stream:
        for number, content in _fields(stream, _OPSET_IMPORT):
            if number == _OPSET_IMPORT and isinstance(content, bytes):
                entry = dict(_fields(BytesIO(content), _DOMAIN))
                version = entry.get(_VERSION, 0)
                if entry.get(_DOMAIN, b"") in DEFAULT_DOMAINS and isinstance(version, int):
                    found = max(found, version)
    return found


def too_new(file: Path, written_in: str, library: str, version: str, newest: str) -> BackendError:
    """The error for a file that is newer than the library that is to run it."""
    return BackendError(
        f"{file} is written in {written_in}, and {library} {version} reads up to {newest}. Update {library}, or export "
        "the model again in an older one (opset_version of torch.onnx.export)."
    )


def _fields(stream: BinaryIO, wanted: int) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; of those with a length, the content of the wanted one only."""
    while (key := _varint(stream)) is not None:
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, _varint(stream) or 0
            continue
        size = _LENGTHS[kind] if kind in _LENGTHS else _varint(stream) or 0
        if number == wanted:
            yield number, stream.read(size)
        else:
            stream.seek(size, 1)


def _varint(stream: BinaryIO) -> int | None:
    """A number in groups of 7 bits, the lowest first; None at the end."""
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
    return None

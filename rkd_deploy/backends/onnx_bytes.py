"""Reads facts of an ONNX file from its bytes, without the package onnx and its weights.

Reference: https://protobuf.dev/programming-guides/encoding, onnx.proto of https://github.com/onnx/onnx
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

# Field numbers of ModelProto and OperatorSetIdProto; of ModelProto, GraphProto and TensorProto.
_OPSET_IMPORT, _DOMAIN, _VERSION = 8, 1, 2
_GRAPH, _INITIALIZER, _DATA_TYPE = 7, 5, 2
_FLOAT16, _BFLOAT16 = 10, 16
_LENGTHS = {1: 8, 5: 4}  # bytes of the wire types of fixed size

DEFAULT_DOMAINS = (b"", b"ai.onnx")


def opset(file: Path) -> int:
    """The version of ONNX's own operators that a file imports; 0 where it imports none.

    Only the outermost fields are looked at, and the graph and its weights skipped, so it costs the same for any size.

    Args:
        file: An ONNX file that a runtime has read: no other check is made.
    """
    newest = 0
    with file.open("rb") as stream:
        for number, content in _fields(stream, _OPSET_IMPORT):
            if number == _OPSET_IMPORT and isinstance(content, bytes):
                entry = dict(_fields(BytesIO(content), _DOMAIN))
                version = entry.get(_VERSION, 0)
                if entry.get(_DOMAIN, b"") in DEFAULT_DOMAINS and isinstance(version, int):
                    newest = max(newest, version)
    return newest


def has_16_bit_weights(file: Path) -> bool:
    """Whether most bytes of a file's weights are float16 or bfloat16.

    Only the head of each weight is read, so it costs little for any size.

    Args:
        file: An ONNX file; of one that is broken nothing is said but False.
    """
    half = total = 0
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for graph in _spans(stream, _GRAPH, size):
            for tensor in _spans(stream, _INITIALIZER, graph):
                length, kind = tensor - stream.tell(), _number(stream, _DATA_TYPE, tensor)
                total += length
                half += length if kind in (_FLOAT16, _BFLOAT16) else 0
    return 2 * half > total


def _spans(stream: BinaryIO, wanted: int, end: int) -> Iterator[int]:
    """Go to each message of one field, up to `end`: while it is looked at, the stream stands at its start.

    Yields:
        Where the message ends.
    """
    while stream.tell() < end and (key := _varint(stream)) is not None:
        size = _size(stream, key & 7)
        until = stream.tell() + size
        if key >> 3 == wanted and key & 7 == 2:
            yield until
        stream.seek(until)


def _number(stream: BinaryIO, wanted: int, end: int) -> int | None:
    """The first number of one field in a message that ends at `end`."""
    while stream.tell() < end and (key := _varint(stream)) is not None:
        if key & 7 == 0:
            value = _varint(stream)
            if key >> 3 == wanted:
                return value
        else:
            size = _size(stream, key & 7)
            stream.seek(size, 1)
    return None


def _size(stream: BinaryIO, kind: int) -> int:
    """Bytes of a value of this wire type, from where the stream stands; of a number it is read, and 0 are left."""
    if kind == 0:
        _varint(stream)
        return 0
    return _LENGTHS[kind] if kind in _LENGTHS else _varint(stream) or 0


def _fields(stream: BinaryIO, wanted: int) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; fields with a length are skipped but for the wanted one."""
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
    """A protobuf varint: a number in groups of 7 bits, the lowest first; None at the end of the stream."""
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
    return None

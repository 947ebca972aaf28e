"""Reads JSON into typed frozen values; what does not fit is an error that names the place."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rkd_deploy.storage import read_text

T = TypeVar("T")

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
_DIGITS = 20
"""Characters of the longest whole number: 64 bits and a sign."""

LARGEST_FILE = 1 << 29
"""Bytes of a JSON file that is read at most: a bench of hours, with every sample, has a tenth of them."""


class DecodingError(ValueError):
    """JSON that is not what it has to be; the message names the place and what was expected there."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DecodingError: The file cannot be read, is no regular file or too large, or holds no JSON object that
            `parse_object` takes.
    """
    try:
        return parse_object(read_text(path, limit=LARGEST_FILE))
    except OSError as error:
        raise DecodingError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise DecodingError("it is not UTF-8 text") from error


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        DecodingError: It is no JSON object, is nested too deeply, or has NaN, infinity or a number beyond 64 bits.
    """
    try:
        content = json.loads(text, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse_constant)
    except DecodingError:
        raise
    except ValueError as error:
        raise DecodingError(f"it is no JSON: {error}") from error
    except RecursionError as error:
        raise DecodingError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise DecodingError(f"it holds {_name(content)} where an object is expected")
    return content


def _parse_int(text: str) -> int:
    if len(text) > _DIGITS:  # a product of two such numbers would be no float any more
        raise DecodingError(f"it has a whole number of {len(text):,} digits")
    return int(text)


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise DecodingError(f"it has {text[:20]}, which no number of 64 bits can be")
    return number


def _refuse_constant(name: str) -> float:
    raise DecodingError(f"{name} is no number in JSON")


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """A value of a type from what JSON made of it.

    Args:
        kind: A dataclass, or bool, int, float, str, a Literal, a union, list, tuple, Sequence or Mapping of these.
            Whole numbers are taken for floats; of a dataclass, keys that it does not know are left out, and fields
            that are not there take their default.
        value: From `json.loads`.
        where: Name of the value in messages, e.g. "results[3].batch".

    Raises:
        DecodingError: The value is of another type, a key is missing, or a number is not finite.
    """
    decoded: T = _decode(kind, value, where)
    return decoded


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is Literal:
        return value if value in arguments and isinstance(value, str) else _refuse(f"one of {arguments}", value, where)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            return _refuse("a list", value, where)
        return _items(origin, arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _refuse("an object", value, where)
        return {
            _key(arguments[0], key, where): _decode(arguments[1], item, f"{where}.{key}" if where else str(key))
            for key, item in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, where)
    # Not isinstance: to Python True is a whole number, to JSON it is none.
    if type(value) is not kind:
        return _refuse(_WORDS.get(kind, kind.__name__), value, where)
    return value if kind is not float or math.isfinite(value) else _refuse("a finite number", value, where)


def _items(origin: Any, kinds: tuple[Any, ...], value: list[Any], where: str) -> Sequence[Any]:
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            return _refuse(f"a list of {len(kinds)}", value, where)
        pairs = zip(kinds, value, strict=True)
        return tuple(_decode(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(pairs))
    # A bench has hundreds of thousands of samples: no place is put together for each of them.
    if kinds[0] is float and all(type(item) is float and math.isfinite(item) for item in value):
        return tuple(value) if origin is tuple else value
    items = [_decode(kinds[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        return _refuse("an object", value, where)
    fields = {}
    for name, field_kind, required in _fields(kind):
        if name in value:
            fields[name] = _decode(field_kind, value[name], f"{where}.{name}" if where else name)
        elif required:
            raise DecodingError(f"{where}.{name} is missing" if where else f"{name} is missing")
    return kind(**fields)


@functools.cache
def _fields(kind: type[Any]) -> tuple[tuple[str, Any, bool], ...]:
    """Name and type of each field of a dataclass, and whether it has no default."""
    hints, missing = typing.get_type_hints(kind), dataclasses.MISSING
    return tuple(
        (field.name, hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    )


def _union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    failures = []
    for kind in kinds:
        try:
            return _decode(kind, value, where)
        except DecodingError as error:
            failures.append(error)
    if value is None or len(failures) == 1:
        raise failures[0]
    # Of "X | None" the error of X tells more: null was not there.
    raise next(error for kind, error in zip(kinds, failures, strict=True) if kind is not type(None))


def _key(kind: Any, key: Any, where: str) -> Any:
    """A key of a mapping: JSON has text alone."""
    try:
        return kind(key)
    except ValueError:
        return _refuse(f"keys of type {kind.__name__}", key, where)


def _as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise DecodingError(f"{where} is out of range") from None


def _refuse(expected: str, value: Any, where: str) -> typing.NoReturn:
    raise DecodingError(f"{where or 'the content'} is {_name(value)} where {expected} is expected")


def _name(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."

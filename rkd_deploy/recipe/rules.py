"""What the tables of a recipe have in common: values as TOML, and rules that name the key. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import types
import typing
from typing import Any

from rkd_deploy.errors import RecipeError, UsageError, shortened, unknown_name
from rkd_deploy.fields import check_number

MOST = 10**6
"""Largest number of epochs, images of a batch and the like, and largest weight of a loss: no training comes near it."""
MOST_THREADS = 4096
_LARGEST_DEVIATION = 1e6
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
"""What may stand for a number; NumPy's are of these."""
_LONGEST_LIST = 1000
_LONGEST_TEXT = 4096
"""Bytes of the longest path of Linux."""


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # The escapes of JSON are escapes of TOML's basic strings; only TOML wants one for DEL too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)


def check_types(table: str, settings: Any) -> None:
    """Hold every field of a table to its type, wherever it came from: a file, --set or a call.

    Lists become tuples, whole numbers floats where a float is wanted, NumPy's numbers Python's own: a recipe is written
    back as TOML, which has no others.

    Args:
        table: Its name, for messages.
        settings: One of the frozen dataclasses of a recipe; such fields are replaced in it.

    Raises:
        RecipeError: A value is of another type, or a text that is no UTF-8 or too long.
    """
    hints = _hints(settings.__class__)
    for field in dataclasses.fields(settings):
        value, wanted = getattr(settings, field.name), hints[field.name]
        if typing.get_origin(wanted) is types.UnionType:  # "X | None": TOML has no null, a missing key is None
            if value is None:
                continue
            wanted = next(item for item in typing.get_args(wanted) if item is not types.NoneType)
        object.__setattr__(settings, field.name, convert(f"{table}.{field.name}", wanted, value))


def convert(key: str, wanted: Any, value: Any) -> Any:
    """A value as a field of a recipe has it; arguments and errors as for `check_types`."""
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key} = {shortened(value)} must be a list, e.g. {key.split('.')[-1]} = [...].")
        if len(value) > _LONGEST_LIST:
            raise RecipeError(f"{key} has {len(value):,} values, and at most {_LONGEST_LIST:,} are read.")
        return tuple(convert(key, typing.get_args(wanted)[0], item) for item in value)
    if type(value) is not wanted and (isinstance(value, bool) or not isinstance(value, _NUMBERS.get(wanted, ()))):
        raise RecipeError(f"{key} = {shortened(value)} must be of type {wanted.__name__}.")
    if isinstance(value, str):
        _check_text(key, value)
    try:
        return wanted(value)
    except OverflowError:  # a whole number that no float can be: every key has a range, which says so
        return value


def _check_text(key: str, value: str) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # bytes of an argument that are no UTF-8
        raise RecipeError(f"{key} = {shortened(value)} is no UTF-8 text, so that no recipe can hold it.") from error
    if size > _LONGEST_TEXT:
        raise RecipeError(f"{key} has {size:,} bytes, and at most {_LONGEST_TEXT:,} are read.")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise RecipeError(unknown_name(f"value of {key}", value, choices))


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Refuse what is not from low to high, NaN and infinity; the message has the range."""
    try:
        check_number(f"{key} =", value, low, high)
    except UsageError as error:
        raise RecipeError(str(error)) from error


def rising(key: str, values: tuple[int, ...], low: int, high: int) -> None:
    """Refuse whole numbers that do not rise, or are not from low to high."""
    if list(values) != sorted(set(values)) or (values and not low <= values[0] <= values[-1] <= high):
        raise RecipeError(f"{key} = {shortened(list(values))} must rise, between {low} and {high}.")


def normalisation(table: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Refuse a mean or standard deviation that no RGB images have."""
    for key, values, low in (("mean", mean, -_LARGEST_DEVIATION), ("std", std, 1 / _LARGEST_DEVIATION)):
        if values is not None and len(values) != 3:
            raise RecipeError(
                f"{table}.{key} = {shortened(list(values))} has {len(values)} values; there are 3 channels (RGB)."
            )
        for value in values or ():
            in_range(f"{table}.{key}", value, low, _LARGEST_DEVIATION)

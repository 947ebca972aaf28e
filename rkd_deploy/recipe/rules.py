"""Rules of a recipe's keys: range, choices and where each is read, declared with the key."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rkd_deploy.errors import RecipeError, UsageError, shortened, unknown_name
from rkd_deploy.fields import check_number

MOST = 10**6
"""Largest number of epochs, images of a batch and the like, and largest weight of a loss: no training comes near it."""
LARGEST_DEVIATION = 1e6
"""Largest mean and standard deviation of images, and the smallest of a standard deviation by its inverse."""
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
"""What may stand for a number; NumPy's are of these."""
_LONGEST_LIST = 1000
_LONGEST_TEXT = 4096
"""Bytes of the longest path of Linux."""
_RULE = "recipe rule"


@dataclass(frozen=True)
class ReadWhere:
    """Where a key is read: in words, and as a predicate.

    Attributes:
        words: The end of the sentence "it is read only ..".
        holds: Whether the key is read, of a table (`DataRecipe` and its sisters).
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for a key beside its type.

    Attributes:
        low: Least number; of a list, for each item.
        high: Largest number; `MOST` where there is a least one and nothing else is said.
        choices: Allowed names; of a list, for each item. Empty: any.
        read: Where the key is read; elsewhere it must keep its default. None: everywhere.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    read: ReadWhere | None = None

    @property
    def range(self) -> str | None:
        """The range in words, None where there is none."""
        return None if self.low is None else f"{self.low} to {self.high}"


def key(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    read: ReadWhere | None = None,
) -> Any:
    """A dataclass field that is a key of a recipe, with its default and the attributes of its `Rule`."""
    rule = Rule(low=low, high=MOST if low is not None and high is None else high, choices=choices, read=read)
    return dataclasses.field(default=default, metadata={_RULE: rule})


def rule_of(field: dataclasses.Field[Any]) -> Rule:
    """The rule that a key was declared with."""
    rule: Rule = field.metadata.get(_RULE, Rule())
    return rule


def check_keys(name: str, table: Any, situation: str) -> None:
    """Hold every key of a table to its rule; None stands for a default, and is in every range.

    Args:
        name: Name of the table.
        table: The table.
        situation: What decides on where keys are read, as the table has it, for messages.

    Raises:
        RecipeError: A value is of another type, a number out of its range, a text no UTF-8 or too long, a name none of
            the choices, or a key that nothing reads is set.
    """
    _check_types(name, table)
    for field in dataclasses.fields(table):
        rule, value = rule_of(field), getattr(table, field.name)
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if rule.choices:
                choice(f"{name}.{field.name}", item, rule.choices)
            if rule.low is not None and rule.high is not None:
                in_range(f"{name}.{field.name}", item, rule.low, rule.high)
    # A setting that nothing reads is a misunderstanding, and is better said before hours of training than after them.
    for field in dataclasses.fields(table):
        read, value = rule_of(field).read, getattr(table, field.name)
        if read is None or value == field.default or read.holds(table):
            continue
        # A value that stands in a file is replaced by --set: the way out for who cannot change the file.
        default = "" if field.default is None else f", or --set {name}.{field.name}={toml_value(field.default)}"
        raise RecipeError(
            f"{name}.{field.name} = {toml_value(value)} has no effect with {situation}: it is read only {read.words}. "
            f"Leave it out{default}."
        )


def read_values(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a table's keys without those that nothing reads, which may be the default of another time.

    Args:
        kind: Class of the table.
        values: Values by key, as TOML has them; they need not be valid.
    """
    table = object.__new__(kind)
    rules = {field.name: rule_of(field) for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        object.__setattr__(table, field.name, values.get(field.name, field.default))
    try:
        unread = {name for name, rule in rules.items() if rule.read is not None and not rule.read.holds(table)}
    except TypeError:  # a value of another type, which is refused when the table is made
        return dict(values)
    return {name: value for name, value in values.items() if name not in unread}


def _check_types(name: str, table: Any) -> None:
    """Hold every field of a table to its type, wherever it came from: a file, --set or a call.

    Lists become tuples, whole numbers floats where a float is wanted, NumPy's numbers Python's own: a recipe is written
    back as TOML, which has no others.
    """
    hints = _hints(table.__class__)
    for field in dataclasses.fields(table):
        value, wanted = getattr(table, field.name), hints[field.name]
        if typing.get_origin(wanted) is types.UnionType:  # "X | None": TOML has no null, a missing key is None
            if value is None:
                continue
            wanted = next(item for item in typing.get_args(wanted) if item is not types.NoneType)
        object.__setattr__(table, field.name, typed_value(f"{name}.{field.name}", wanted, value))


def typed_value(key: str, wanted: Any, value: Any) -> Any:
    """A value as a field of a recipe has it.

    Args:
        key: Its key, for messages.
        wanted: bool, int, float, str, or a tuple of one of these.
        value: From TOML, --set or a call.

    Raises:
        RecipeError: It is of another type, a text that is no UTF-8, or too long.
    """
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key} = {shortened(value)} must be a list, e.g. {key.split('.')[-1]} = [...].")
        if len(value) > _LONGEST_LIST:
            raise RecipeError(f"{key} has {len(value):,} values, and at most {_LONGEST_LIST:,} are read.")
        return tuple(typed_value(key, typing.get_args(wanted)[0], item) for item in value)
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


def rising(key: str, values: tuple[int, ...]) -> None:
    """Refuse whole numbers that do not rise."""
    if list(values) != sorted(set(values)):
        raise RecipeError(f"{key} = {shortened(list(values))} must rise.")


def three_channels(table: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Refuse a mean or standard deviation of other than RGB images."""
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise RecipeError(
                f"{table}.{key} = {shortened(list(values))} has {len(values)} values; there are 3 channels (RGB)."
            )

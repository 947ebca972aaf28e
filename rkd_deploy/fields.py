"""Fields of settings that a command line sets: option, help, range and choices in one place."""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rkd_deploy.errors import UsageError, shortened, unknown_name

_KEY = "option"

MOST_THREADS = 4096
"""More than any machine has cores: a larger number is a slip, and every runtime would try to start so many."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a settings field beside its type and default.

    Attributes:
        flag: The option of the command line, e.g. ``--max-batch``.
        help: One line for ``--help``.
        reads: Type that the command line reads. Default: the field's own.
        parse: From what the command line read to the field's value. Default: the same value.
        low: Least number.
        high: Largest number.
        choices: Allowed names; empty: any.
        shared: Whether the command declares the option by itself, because other settings have it too.
    """

    flag: str
    help: str
    reads: Any = None
    parse: Callable[[Any], Any] | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    shared: bool = False


def option(flag: str, help: str, *, default: Any, **rules: Any) -> Any:
    """A dataclass field that the option `flag` sets; `rules` are the other attributes of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(flag=flag, help=help, **rules)})


def options_of(settings: Any) -> Mapping[str, Option]:
    """The options of a settings class, or of one of its objects, by the names of their fields."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(settings) if _KEY in field.metadata}


def changed_flags(settings: Any, *names: str) -> list[str]:
    """The options, of these fields of a settings object or of all, whose values differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return [
        declared.flag
        for name, declared in options_of(settings).items()
        if (not names or name in names) and getattr(settings, name) != defaults[name]
    ]


def check_fields(settings: Any) -> None:
    """Hold every declared field of a settings object to its range or choices; None stands for a default.

    Raises:
        UsageError: A number is out of its range or not finite, a whole number is none, a name is none of the choices.
    """
    hints = typing.get_type_hints(type(settings))
    for name, declared in options_of(settings).items():
        value = getattr(settings, name)
        if value is None:
            continue
        # Where the command line reads another unit or form than the field has, the message names both.
        shown = declared.flag if declared.parse is None else f"{declared.flag}: {name} ="
        if declared.choices and value not in declared.choices:
            raise UsageError(unknown_name(declared.flag, str(value), declared.choices))
        if declared.low is not None or declared.high is not None:
            whole = float not in (hints[name], *typing.get_args(hints[name]))
            check_number(shown, value, declared.low, declared.high, whole=whole)


def check_number(name: str, value: Any, low: float | None, high: float | None = None, *, whole: bool = False) -> None:
    """Refuse what is no finite number from `low` to `high`.

    Args:
        name: What the message calls it, e.g. ``--max-batch``.
        value: To be judged; a bool is no number.
        low: Least number; None: there is none.
        high: Largest number; None: there is none.
        whole: Whether it must be an int.

    Raises:
        UsageError: It is not; the message has the range.
    """
    kind = numbers.Integral if whole else numbers.Real  # NumPy's numbers are of these, and no int or float
    numeric = isinstance(value, kind) and not isinstance(value, bool)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if numeric and low <= value <= high and abs(value) < math.inf:  # every comparison with NaN is false
        return
    rule = f"between {low} and {high}" if high < math.inf else f"at least {low}" if low > -math.inf else "finite"
    raise UsageError(f"{name} {_shown(value)} must be {'a whole number ' if whole else ''}{rule}.")


def _shown(value: Any) -> str:
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return shortened(value)
    return text if len(text) <= 80 else shortened(value)

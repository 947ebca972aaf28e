"""Rules of a recipe's keys: range, choices and where each is read, declared with the key."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rkd_deploy.errors import RecipeError, unknown_name

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
        high: Largest number.
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
        if self.low is None:
            return None
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


def key(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    read: ReadWhere | None = None,
) -> Any:
    """A dataclass field that is a key of a recipe, with its default and the attributes of its `Rule`."""
    rule = Rule(low=low, high=high, choices=choices, read=read)
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
        RecipeError: A number is out of its range, a name is none of the choices, or a key that nothing reads is set.
    """
    for field in dataclasses.fields(table):
        rule, value = rule_of(field), getattr(table, field.name)
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if rule.choices:
                choice(f"{name}.{field.name}", item, rule.choices)
            if rule.low is not None:
                in_range(f"{name}.{field.name}", item, rule.low, rule.high)
    # A setting that nothing reads is a misunderstanding, and is better said before hours of training than after them.
    for field in dataclasses.fields(table):
        read, value = rule_of(field).read, getattr(table, field.name)
        if read is None or value == field.default or read.holds(table):
            continue
        default = "" if field.default is None else f", or --set {name}.{field.name}={toml_value(field.default)}"
        raise RecipeError(
            f"{name}.{field.name} = {toml_value(value)} has no effect with {situation}: it is read only {read.words}. "
            f"Leave it out{default}."
        )


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


def in_range(key: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse what is not from low to high, NaN and infinity."""
    finite = value < math.inf
    if not value >= low or not finite or (high is not None and not value <= high):  # every comparison with NaN is false
        rule = f"between {low} and {high}" if high is not None else f"at least {low}" if finite else "finite"
        raise RecipeError(f"{key} = {value} must be {rule}.")


def normalisation(table: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Refuse a mean or standard deviation that no RGB images have."""
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise RecipeError(f"{table}.{key} = {list(values)} has {len(values)} values; there are 3 channels (RGB).")
        if values is not None and not all(math.isfinite(value) for value in values):
            raise RecipeError(f"{table}.{key} = {list(values)} must be finite.")
    if std is not None and min(std) <= 0:
        raise RecipeError(f"{table}.std = {list(std)} must be positive.")

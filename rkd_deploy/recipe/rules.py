"""What the tables of a recipe have in common: values as TOML, and rules that name the key. Standard library only."""

from __future__ import annotations

import json
import math
from typing import Any

from rkd_deploy.errors import RecipeError, unknown_name


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
    if not value >= low or not finite or (high is not None and not value <= high):  # also refuses NaN
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

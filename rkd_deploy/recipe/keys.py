"""Every key of a recipe with its default and its meaning, from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass

from rkd_deploy.recipe import Recipe
from rkd_deploy.recipe.rules import toml_value

_WIDTH = 100


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        table: Its table.
        name: Its name in the table.
        default: As TOML writes it; None where the key is unset unless a recipe sets it.
        meaning: What it does, and which values it takes.
    """

    table: str
    name: str
    default: str | None
    meaning: str


def recipe_keys() -> list[Key]:
    """All keys, table by table, in the order in which a recipe is written back."""
    recipe, keys = Recipe(), []
    for table in dataclasses.fields(recipe)[1:]:
        values = getattr(recipe, table.name)
        meanings = _field_docstrings(type(values))
        for key in dataclasses.fields(values):
            default = getattr(values, key.name)
            text = None if default is None else toml_value(default)
            keys.append(Key(table.name, key.name, text, meanings[key.name]))
    return keys


def keys_as_toml() -> str:
    """A recipe of all defaults with the meaning of each key above it; keys that are unset stand as comments."""
    lines, table = ["# Names the run folders.", f"name = {toml_value(Recipe().name)}"], ""
    for key in recipe_keys():
        if key.table != table:
            table = key.table
            lines += ["", f"[{table}]"]
        lines += textwrap.wrap(key.meaning, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        lines.append(f"# {key.name} =" if key.default is None else f"{key.name} = {key.default}")
    return "\n".join(lines) + "\n"


def _field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a class, which Python itself does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    docstrings = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docstrings[field.target.id] = " ".join(inspect.cleandoc(ast.literal_eval(below.value)).split())
    return docstrings

"""Every key of a recipe: default, meaning, range and where it is read, from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass

from rkd_deploy.recipe import Recipe
from rkd_deploy.recipe.rules import rule_of, toml_value

_WIDTH = 100


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        table: Name of the table.
        name: Name of the key in its table.
        default: The default as TOML writes it; None where the key is unset unless a recipe sets it.
        meaning: What the key does, and which values it takes.
        range: Numbers that it takes; None where it takes no number, or any.
        read: Where it is read, e.g. ``with student.layout = "trunk"``; None: everywhere.
    """

    table: str
    name: str
    default: str | None
    meaning: str
    range: str | None = None
    read: str | None = None

    @property
    def sentences(self) -> str:
        """Meaning, range and where the key is read, as sentences."""
        rules = ((self.range, "Range: "), (self.read, "Read only "))
        return " ".join([_ended(self.meaning), *(f"{begin}{rule}." for rule, begin in rules if rule is not None)])


def _ended(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def recipe_keys() -> list[Key]:
    """All keys, table by table, in the order in which a recipe is written back."""
    recipe, keys = Recipe(), []
    for table in dataclasses.fields(recipe)[1:]:
        values = getattr(recipe, table.name)
        meanings = _field_docstrings(type(values))
        for key in dataclasses.fields(values):
            default, rule = getattr(values, key.name), rule_of(key)
            text = None if default is None else toml_value(default)
            read = None if rule.read is None else rule.read.words
            keys.append(Key(table.name, key.name, text, meanings[key.name], rule.range, read))
    return keys


def keys_as_toml() -> str:
    """A recipe of all defaults with the sentences of each key above it; keys that are unset stand as comments."""
    lines, table = ["# Names the run folders.", f"name = {toml_value(Recipe().name)}"], ""
    for key in recipe_keys():
        if key.table != table:
            table = key.table
            lines += ["", f"[{table}]"]
        lines += textwrap.wrap(
            key.sentences, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        lines.append(f"# {key.name} =" if key.default is None else f"{key.name} = {key.default}")
    return "\n".join(lines) + "\n"


def _field_docstrings(kind: type) -> dict[str, str]:
    """Docstring of each field of a class: the string below it, which Python itself does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    docstrings = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docstrings[field.target.id] = " ".join(inspect.cleandoc(ast.literal_eval(below.value)).split())
    return docstrings

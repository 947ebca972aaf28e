"""A recipe: one TOML file that says everything about a training run.

Tables and keys are dataclasses, each table's in a file of its own: `data.py` and its sisters. A key is declared with
its default, its range or choices and where it is read, all in one place (`rules.key`). `--set table.key=value` replaces
one value; `read_recipe` checks every key, type and rule before anything is computed, and `to_toml` writes the whole
recipe back, so that a run folder reproduces itself. Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.errors import RecipeError, shortened, unknown_name
from rkd_deploy.recipe.data import DataRecipe
from rkd_deploy.recipe.method import MethodRecipe
from rkd_deploy.recipe.networks import StudentRecipe, TeacherRecipe
from rkd_deploy.recipe.rules import read_values, toml_value, typed_value
from rkd_deploy.recipe.train import TrainRecipe
from rkd_deploy.storage import read_text

__all__ = [
    "DataRecipe",
    "MethodRecipe",
    "Recipe",
    "StudentRecipe",
    "TeacherRecipe",
    "TrainRecipe",
    "named_by_folder",
    "override_values",
    "parse_recipe",
    "read_recipe",
]

_LARGEST = 2**20
"""Size of the largest recipe that is read, in bytes."""
_LONGEST_NAME = 200
"""Bytes: a folder's name may have 255, of which a number and the ends of temporary names take a part."""
_LONGEST_OVERRIDE = 10_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run. Every default can be used as it is: `Recipe()` trains on digits."""

    name: str = "recipe"
    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    method: MethodRecipe = field(default_factory=MethodRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        self._check_name()
        for table, kind in _TABLES.items():
            if not isinstance(values := getattr(self, table), kind):
                raise RecipeError(f"{table} = {shortened(values)} must be a {kind.__name__}; parse_recipe makes one.")
        if self.student.assistants == 1 and self.method.step_decay != MethodRecipe.step_decay:
            raise RecipeError(
                f"method.step_decay = {self.method.step_decay} weighs the steps of a chain, and student.assistants "
                "= 1. Leave it out, or set student.assistants above 1."
            )
        if self.method.residual and self.method.scheme == "progressive":
            self._check_progressive()
        if not self.method.residual:
            self._check_baseline()
        self._check_data()

    def _check_name(self) -> None:
        typed_value("name", str, self.name)
        rule = "names the run folders: it must not be empty or hold a slash"
        if not self.name or set(self.name) & set("/\\\0"):
            raise RecipeError(f"name = {shortened(self.name)} {rule}.")
        if not self.name.isprintable() or len(self.name.encode()) > _LONGEST_NAME:
            raise RecipeError(
                f"name = {shortened(self.name)} {rule}, must be printable, and at most {_LONGEST_NAME} bytes long."
            )

    def _check_data(self) -> None:
        teacher = self.teacher
        stated = teacher.checkpoint is not None or teacher.pretrained or (teacher.mean and teacher.std)
        if self.data.normalisation == "teacher" and not stated:
            raise RecipeError(
                'data.normalisation = "teacher", and nothing states that of T. Set teacher.mean and teacher.std, or '
                "teacher.checkpoint to weights that this package wrote, or teacher.pretrained."
            )
        if self.method.loss == "dkd" and (self.data.mixup or self.data.cutmix):
            raise RecipeError(
                f"data.mixup = {self.data.mixup} and data.cutmix = {self.data.cutmix} mix labels, and dkd needs one "
                'class for each image. Set both to 0, or take another loss, e.g. "kd".'
            )

    @property
    def has_control(self) -> bool:
        """Whether the control "S0, same losses" is trained too."""
        method, student = self.method, self.student
        return method.residual and method.scheme != "progressive" and student.baseline and student.control

    def _check_progressive(self) -> None:
        """Refuse what is built for one pass of S and one of A, and not for stages that exchange their maps."""
        if self.student.budget == "latency":
            raise RecipeError(
                'student.budget = "latency" is measured with other schemes. Set student.budget = "macs" or "params", '
                'or a method.scheme other than "progressive".'
            )
        if self.student.layout in ("side_by_side", "trunk"):
            raise RecipeError(
                f'student.layout = "{self.student.layout}", and with method.scheme = "progressive" S and A exchange '
                "their maps at every stage, so that their layers cannot be merged. Leave one of them out."
            )
        if self.student.weights == "inherited":
            raise RecipeError(
                'student.weights = "inherited" has no effect with method.scheme = "progressive": fresh adapters lie '
                "between the stages, behind which trained weights are worth nothing. Leave it out."
            )

    def _check_baseline(self) -> None:
        """Refuse settings that take S0 away or cut assistants from it: S0 is what a baseline trains."""
        name = f'method.name = "{self.method.name}" trains S0 itself'
        if self.student.checkpoint is not None:
            raise RecipeError(
                f"{name}, and student.checkpoint = {self.student.checkpoint!r} gives it trained. Leave one of them out."
            )
        if not self.student.baseline:
            raise RecipeError(f"{name}, and student.baseline = false leaves it out. Leave that key out.")
        if self.student.layout is not None:
            raise RecipeError(
                f"{name}, without assistants, and student.layout = {self.student.layout!r} says how S and A lie. Leave "
                'that key out, or set method.name = "residual".'
            )
        if self.student.assistants > 1:
            raise RecipeError(
                f"{name}, without assistants, and student.assistants = {self.student.assistants}. Leave that key out, "
                'or set method.name = "residual".'
            )

    def to_toml(self) -> str:
        """The recipe as TOML, every value that is set; `read_recipe` gives the equal recipe back."""
        lines = [f"name = {toml_value(self.name)}"]
        for table in dataclasses.fields(self)[1:]:
            lines += ["", f"[{table.name}]"]
            values = dataclasses.asdict(getattr(self, table.name))
            lines += [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"


_TABLES = {"data": DataRecipe, "teacher": TeacherRecipe, "student": StudentRecipe, "method": MethodRecipe}
_TABLES |= {"train": TrainRecipe}


def read_recipe(path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and replace single values.

    A `method.name` that differs from the file's begins a table `[method]` of its own: what stands in the file's was
    chosen for the method that is replaced.

    Args:
        path: A TOML file; None gives the defaults, and a set of files names the recipe by its folder. A file that lies
            in a run folder takes given weights from the copies in there, so that the folder alone reproduces the run,
            wherever it was moved.
        overrides: `table.key=value` each, the value written as in TOML (a string may go without quotes).

    Raises:
        RecipeError: The file is missing or no TOML, a key or value is unknown or of the wrong type, or a rule is
            broken. The message names the key and the choices.
    """
    content: dict[str, Any] = {}
    is_list = isinstance(overrides, Iterable) and not isinstance(overrides, str | bytes)
    if not (path is None or isinstance(path, str | os.PathLike)) or not is_list:
        raise RecipeError(
            f"A recipe was given as {type(path).__name__} with overrides of type {type(overrides).__name__}; "
            "it takes a path and a list of texts such as train.epochs=5."
        )
    if path is not None:
        path = Path(path)
        try:
            content = tomllib.loads(read_text(path, limit=_LARGEST))
        except OSError as error:
            raise RecipeError(f"No recipe can be read at {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"No recipe can be read at {path}: {error}.") from error
        except RecursionError as error:
            raise RecipeError(f"{path} is nested too deeply to be a recipe.") from error
        except ValueError as error:  # no TOML, or a whole number of thousands of digits
            raise RecipeError(f"{path} is not valid TOML: {error}.") from error
        content.setdefault("name", path.stem if path.stem != "recipe" else path.resolve().parent.name)
        if (path.parent / "facts.json").is_file():
            _modernise(content)
        _use_run_copies(content, path.parent)
    of_file = content.pop("method", {})
    for override in overrides:
        _apply(content, override)
    if isinstance(of_file, dict):
        name, overridden = of_file.get("name", MethodRecipe.name), content.get("method", {})
        content["method"] = overridden if overridden.get("name", name) != name else of_file | overridden
    else:
        content["method"] = of_file  # no table: refused with the others
    recipe = parse_recipe(content)
    return recipe if "name" in content else named_by_folder(recipe)


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """What overrides set, as nested mappings by table and key; errors as for `read_recipe`."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def named_by_folder(recipe: Recipe) -> Recipe:
    """The recipe under the name of the folder that its images are in, where it has one."""
    folder = recipe.data.folder_name
    return dataclasses.replace(recipe, name=folder) if folder else recipe


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """Make a recipe of nested mappings, as tomllib gives them; errors as for `read_recipe`."""
    tables = typing.get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in tables:
            raise RecipeError(unknown_name("recipe table", key, tables))
        values[key] = value if key == "name" else _parse_table(key, tables[key], value)
    return Recipe(**values)


def _parse_table(table: str, owner: type[Any], content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{table} = {shortened(content)} must be a table: write [{table}] and its keys below.")
    hints = typing.get_type_hints(owner)
    for key in content:
        if f"{table}.{key}" in _RETIRED:
            raise RecipeError(f"{table}.{key} is a key no more: {_RETIRED[f'{table}.{key}']}.")
        if key not in hints:
            raise RecipeError(unknown_name("recipe key", f"{table}.{key}", [f"{table}.{hint}" for hint in hints]))
    return owner(**content)


_RETIRED = {"method.kl_weight": 'KL to T is method.base = "kd" now, and method.base_weight is its factor'}
"""Keys of earlier recipes, and what replaces them today. Run folders of that time are still read, without them."""
_ABSENT = {"student": {"control": False}}
"""Values of keys that earlier runs lack, where those runs did something else than today's default."""


def _modernise(content: dict[str, Any]) -> None:
    """Bring the recipe of an earlier run to today's keys.

    It states every value, also of keys that its method does not read and whose default has changed since: these are
    left out. A key that it lacks is younger than the run.
    """
    for key in _RETIRED:
        table, name = key.split(".")
        if isinstance(values := content.get(table), dict):
            values.pop(name, None)
    for table, then in _ABSENT.items():
        if isinstance(values := content.setdefault(table, {}), dict):
            content[table] = then | values
    if isinstance(data := content.get("data"), dict) and data.get("name", "digits") == "digits":
        data.pop("root", None)  # was allowed, and never read
    for table, owner in typing.get_type_hints(Recipe).items():
        if isinstance(values := content.get(table), dict):
            content[table] = read_values(owner, values)


def _use_run_copies(content: dict[str, Any], folder: Path) -> None:
    """Point `teacher.checkpoint` and `student.checkpoint` to the run folder's copies, where it has them."""
    for table, name in (("teacher", "teacher"), ("student", "s0")):
        copy, values = folder / "weights" / f"{name}.safetensors", content.get(table)
        if isinstance(values, dict) and "checkpoint" in values and copy.is_file():
            values["checkpoint"] = str(copy)
            for key in ("checkpoint_key", "labels"):  # the copy has one set, in the order of the data
                values.pop(key, None)


def _apply(content: dict[str, Any], override: str) -> None:
    if not isinstance(override, str):
        raise RecipeError(f"An override is {shortened(override)}; it must be a text such as train.epochs=5.")
    key, separator, text = override.partition("=")
    table, dot, name = key.strip().partition(".")
    form = "is not of the form table.key=value, e.g. --set train.epochs=5"
    if not separator or (table == "name") == bool(dot):
        raise RecipeError(f"--set {shortened(override)} {form}.")
    if len(override) > _LONGEST_OVERRIDE or "\n" in text.strip() or "\r" in text.strip():
        raise RecipeError(
            f"--set {shortened(override)} {form}: one value, on one line of at most {_LONGEST_OVERRIDE:,} characters. "
            "Write longer ones into a recipe file."
        )
    value = _parse_value(text, override)
    if table == "name":
        content["name"] = value if isinstance(value, str) else text.strip()  # a run may be called 2026
        return
    target = content.setdefault(table, {})
    if not isinstance(target, dict):
        raise RecipeError(f"{table} is not a table, so --set {shortened(override)} cannot be applied.")
    target[name] = value


def _parse_value(text: str, override: str) -> Any:
    """The value that TOML makes of a text, else the text: a bare word, which is a name or a path."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    except ValueError as error:  # a whole number of thousands of digits
        raise RecipeError(f"--set {shortened(override)}: {error}.") from error

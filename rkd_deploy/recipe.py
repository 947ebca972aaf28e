"""A recipe: one TOML file that says everything about a training run.

Tables and keys are the dataclasses below, `[data]`, `[method]` and `[train]` in `recipe_data.py` and its sisters.
`--set table.key=value` replaces one value; `read_recipe` checks every key, type and rule before anything is computed,
and `to_toml` writes the whole recipe back, so that a run folder reproduces itself. Standard library only.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.errors import RecipeError, unknown_name
from rkd_deploy.recipe_data import DataRecipe
from rkd_deploy.recipe_method import MethodRecipe
from rkd_deploy.recipe_rules import choice as _choice
from rkd_deploy.recipe_rules import in_range as _range
from rkd_deploy.recipe_rules import normalisation as _normalisation
from rkd_deploy.recipe_rules import toml_value as _toml_value
from rkd_deploy.recipe_train import TrainRecipe

__all__ = [
    "DataRecipe",
    "MethodRecipe",
    "Recipe",
    "StudentRecipe",
    "TeacherRecipe",
    "TrainRecipe",
    "parse_recipe",
    "read_recipe",
]


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Table `[teacher]`: the network T that is imitated."""

    name: str = "resnet20"
    """A family's (resnet56), tv:NAME of torchvision, timm:NAME, or your own nn.Module as package.module:attribute."""
    checkpoint: str | None = None
    """Its weights (.safetensors, or .pth/.pt read with weights_only). Default: T is trained here first."""
    pretrained: bool = False
    """Start from the weights that torchvision or timm publish. With other classes than theirs T is trained on here."""
    stages: tuple[str, ...] | None = None
    """Where the stages of a tv:, timm: or module:attribute network end, deepest last. Default: found by running it."""
    epochs: int | None = None
    """Epochs to train T for when there is no checkpoint. Default: train.epochs."""
    lr: float | None = None
    """Peak learning rate of that training, where T's family wants another one than S0's. Default: train.lr."""
    mean: tuple[float, ...] | None = None
    """The normalisation T was trained with, where it is known: checked against that of the data."""
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None:
            _range("teacher.epochs", self.epochs, 1)
        if self.lr is not None:
            _range("teacher.lr", self.lr, 1e-9)
        _external("teacher", self)
        _normalisation("teacher", self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """Table `[student]`: the given network S0, and how S and A are cut from its cost."""

    name: str = "resnet8"
    """As for T; or teacher: S0 is the teacher's own network, narrowed to `fraction` of its cost, weights inherited."""
    fraction: float | None = None
    """Only where name = "teacher": what S0 costs in units of T, by `budget`."""
    checkpoint: str | None = None
    """Trained weights of S0, for the baseline and to be inherited. Default: S0 is trained here."""
    weights: str | None = None
    """inherited: S and A (and S0 where name = "teacher") begin with the most important channels of the trained network
    they are cut from. fresh: they begin at random. Default: inherited where there is a trained one (scheme
    progressive always begins at random)."""
    pretrained: bool = False
    """Start S0's training from the weights that torchvision or timm publish."""
    stages: tuple[str, ...] | None = None
    """Where the stages of a tv:, timm: or module:attribute network end, deepest last. Default: found by running it."""
    baseline: bool = True
    """Train (or load) S0 itself as the control: same data and loop, cross-entropy, and S's base loss."""
    budget: str = "macs"
    """What must not exceed S0's: macs, params, or latency, which is measured on this machine before training."""
    layout: str | None = None
    """branches: S and A are two branches. side_by_side: their widths add up to S0's, so that level wide of fusion,
    which export then takes, has S0's own operators and shapes, and its speed on any machine; of S0's MACs they have
    about half. Default: branches; with budget = "latency" whichever leaves them more."""
    backend: str | None = None
    """Only for budget = "latency": what runs the networks, onnxruntime or openvino. Default: onnxruntime."""
    latency_batches: tuple[int, ...] | None = None
    """Only for budget = "latency": S + A are no slower than S0 at each of these batch sizes. Default: 1 and 8."""
    latency_threads: int | None = None
    """Only for budget = "latency": CPU threads of the backend. Default: its own choice. With 1, CPU time counts:
    what else the machine does then hardly matters."""
    assistant_share: float = 0.2
    """Share of the budget that all assistants and their adapters may take; S gets what is left."""
    assistants: int = 1
    """Length k of the chain A_1 .. A_k, each learning what the sum before it leaves over; they share equally."""
    round_to: int = 8
    """Channel counts are multiples of this. 8 fits AVX2 and tensor cores, CPUs with AVX-512 compute in blocks of 16;
    widths that fit no block run slower at equal MACs."""

    @property
    def inherits(self) -> bool:
        """Whether S and A begin with weights of a trained network."""
        return (self.weights or ("inherited" if self._trained else "fresh")) == "inherited"

    @property
    def _trained(self) -> bool:
        return self.name == "teacher" or self.checkpoint is not None or self.pretrained

    def __post_init__(self) -> None:
        _choice("student.budget", self.budget, ("macs", "params", "latency"))
        if self.name != "teacher":
            _external("student", self)
        self._check_source()
        self._check_latency()
        if self.layout is not None:
            _choice("student.layout", self.layout, ("branches", "side_by_side"))
        _range("student.assistant_share", self.assistant_share, 0.01, 0.9)
        _range("student.assistants", self.assistants, 1, 16)
        _range("student.round_to", self.round_to, 1, 256)

    def _check_source(self) -> None:
        is_teacher = self.name == "teacher"
        if is_teacher != (self.fraction is not None):
            raise RecipeError(
                f'student.fraction = {self.fraction} and student.name = "{self.name}": the fraction says what the '
                'teacher\'s own network is narrowed to. Set both, e.g. name = "teacher" and fraction = 0.5, or neither.'
            )
        if self.fraction is not None:
            _range("student.fraction", self.fraction, 0.01, 1)
        for name in ("checkpoint", "pretrained", "stages"):
            if is_teacher and (value := getattr(self, name)):
                raise RecipeError(
                    f'student.{name} = {value!r} is about an S0 of its own, and student.name = "teacher" cuts S0 from '
                    f"the teacher. Leave one of them out; the teacher has a key teacher.{name}."
                )
        if self.weights is not None:
            _choice("student.weights", self.weights, ("inherited", "fresh"))
        if self.weights == "inherited" and not self._trained:
            raise RecipeError(
                'student.weights = "inherited" needs a trained network to inherit from: set student.checkpoint or '
                'student.pretrained, or student.name = "teacher".'
            )
        if self.inherits and not is_teacher and not self.baseline:
            raise RecipeError(
                "student.baseline = false leaves S0 out, and S and A are to inherit its weights. Leave that key out, "
                'or set student.weights = "fresh" and give no weights of S0.'
            )

    def _check_latency(self) -> None:
        for name in ("backend", "latency_batches", "latency_threads"):
            if (value := getattr(self, name)) is not None and self.budget != "latency":
                raise RecipeError(
                    f'student.{name} = {value!r} says how latency is measured, and student.budget = "{self.budget}". '
                    'Leave it out, or set student.budget = "latency".'
                )
        if self.backend is not None:
            _choice("student.backend", self.backend, ("onnxruntime", "openvino"))
        if self.latency_threads is not None:
            _range("student.latency_threads", self.latency_threads, 1)
        if self.latency_batches is not None and (not self.latency_batches or min(self.latency_batches) < 1):
            raise RecipeError(f"student.latency_batches = {list(self.latency_batches)} must be batch sizes from 1.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Every default can be used as it is: `Recipe()` trains on digits."""

    name: str = "recipe"
    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    method: MethodRecipe = field(default_factory=MethodRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\\0"):
            raise RecipeError(f"name = {self.name!r} names the run folders: it must not be empty or hold a slash.")
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

    def _check_data(self) -> None:
        teacher = self.teacher
        if self.data.normalisation == "teacher" and teacher.checkpoint is None and not (teacher.mean and teacher.std):
            raise RecipeError(
                'data.normalisation = "teacher", and nothing states that of T. Set teacher.mean and teacher.std, or '
                "teacher.checkpoint to weights that this package wrote."
            )
        if self.method.loss == "dkd" and (self.data.mixup or self.data.cutmix):
            raise RecipeError(
                f"data.mixup = {self.data.mixup} and data.cutmix = {self.data.cutmix} mix labels, and dkd needs one "
                'class for each image. Set both to 0, or take another loss, e.g. "kd".'
            )

    def _check_progressive(self) -> None:
        """What is built for one pass of S and one of A, and not for stages that exchange their maps."""
        if self.student.budget == "latency":
            raise RecipeError(
                'student.budget = "latency" is measured with other schemes. Set student.budget = "macs" or "params", '
                'or a method.scheme other than "progressive".'
            )
        if self.student.layout == "side_by_side":
            raise RecipeError(
                'student.layout = "side_by_side", and with method.scheme = "progressive" S and A exchange their maps '
                "at every stage, so that their layers cannot be merged. Leave one of them out."
            )
        if self.student.weights == "inherited":
            raise RecipeError(
                'student.weights = "inherited" has no effect with method.scheme = "progressive": fresh adapters lie '
                "between the stages, behind which trained weights are worth nothing. Leave it out."
            )

    def _check_baseline(self) -> None:
        """S0 is what a baseline trains: settings that take S0 away, or cut assistants from it, make no sense."""
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
        """Every value that is set, as TOML; `read_recipe` gives the equal recipe back."""
        lines = [f"name = {_toml_value(self.name)}"]
        for table in dataclasses.fields(self)[1:]:
            lines += ["", f"[{table.name}]"]
            values = dataclasses.asdict(getattr(self, table.name))
            lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"


def read_recipe(path: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and replace single values.

    A `method.name` that differs from the file's begins a table `[method]` of its own: what stands in the file's was
    chosen for the method that is replaced.

    Args:
        path: A TOML file; None gives the defaults. One that lies in a run folder takes given weights from the copies
            in there, so that the folder alone reproduces the run, wherever it was moved.
        overrides: `table.key=value` each, the value written as in TOML (a string may go without quotes).

    Raises:
        RecipeError: The file is missing or no TOML, a key or value is unknown or of the wrong type, or a rule is
            broken. The message names the key and the choices.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"No recipe can be read at {path}: {error}.") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path} is not valid TOML: {error}.") from error
        content.setdefault("name", path.stem if path.stem != "recipe" else path.resolve().parent.name)
        _use_own_copies(content, path.parent)
    given = content.pop("method", {})
    for override in overrides:
        _apply(content, override)
    if isinstance(given, dict):
        own, set_here = given.get("name", MethodRecipe.name), content.get("method", {})
        content["method"] = set_here if set_here.get("name", own) != own else given | set_here
    else:
        content["method"] = given  # no table: refused with the others
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """Make a recipe of nested mappings, as tomllib gives them (see `read_recipe`)."""
    tables = typing.get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in tables:
            raise RecipeError(unknown_name("recipe table", key, tables))
        values[key] = _parse_table(key, tables[key], value) if key != "name" else _convert("name", str, value)
    return Recipe(**values)


def _parse_table(table: str, owner: type[Any], content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{table} = {content!r} must be a table: write [{table}] and its keys below.")
    hints = typing.get_type_hints(owner)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise RecipeError(unknown_name("recipe key", f"{table}.{key}", [f"{table}.{hint}" for hint in hints]))
        values[key] = _convert(f"{table}.{key}", hints[key], value)
    return owner(**values)


def _convert(key: str, wanted: Any, value: Any) -> Any:
    if typing.get_origin(wanted) is types.UnionType:  # "X | None": TOML has no null, a missing key is None
        wanted = next(item for item in typing.get_args(wanted) if item is not types.NoneType)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key} = {value!r} must be a list, e.g. {key.split('.')[-1]} = [...].")
        return tuple(_convert(key, typing.get_args(wanted)[0], item) for item in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise RecipeError(f"{key} = {value!r} must be of type {wanted.__name__}.")
    return value


def _use_own_copies(content: dict[str, Any], folder: Path) -> None:
    """The weights that `teacher.checkpoint` and `student.checkpoint` named are in a run folder under its own names."""
    for table, name in (("teacher", "teacher"), ("student", "s0")):
        copy, values = folder / "weights" / f"{name}.safetensors", content.get(table)
        if isinstance(values, dict) and "checkpoint" in values and copy.is_file():
            values["checkpoint"] = str(copy)


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    table, dot, name = key.strip().partition(".")
    if not separator or (not dot and table != "name"):
        raise RecipeError(f"--set {override!r} is not of the form table.key=value, e.g. --set train.epochs=5.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: a name or a path
    if table == "name":
        content["name"] = str(value)
        return
    target = content.setdefault(table, {})
    if not isinstance(target, dict):
        raise RecipeError(f"{table} is not a table, so --set {override!r} cannot be applied.")
    target[name] = value


def _external(table: str, network: TeacherRecipe | StudentRecipe) -> None:
    """Keys that only networks of others have."""
    name = f"{table}.name = {network.name!r}"
    if network.stages is not None and ":" not in network.name:
        raise RecipeError(f"{table}.stages names stages of {name}, and those of a family are given. Leave it out.")
    if network.stages == ():
        raise RecipeError(f"{table}.stages = [] names no stage. Leave it out, and they are found.")
    if network.pretrained and not network.name.startswith(("tv:", "timm:")):
        raise RecipeError(
            f"{table}.pretrained = true, and {name}: only tv:NAME and timm:NAME have published weights. "
            f"Give a file with {table}.checkpoint, or leave it out."
        )
    if network.pretrained and network.checkpoint is not None:
        raise RecipeError(
            f"{table}.pretrained = true and {table}.checkpoint = {network.checkpoint!r} both give weights. "
            "Leave one of them out."
        )

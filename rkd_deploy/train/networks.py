"""The networks of a run: T, S0, and S with its assistants, built from its recipe and its facts."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from rkd_deploy.errors import CheckpointError, UsageError, command_line, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.adapters import with_norms
from rkd_deploy.models.progressive import ProgressiveStudent, progressive_student
from rkd_deploy.models.residual import ResidualStudent, StageAdapters, StudentAlone
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.models.trunk import parted
from rkd_deploy.recipe import Recipe, StudentRecipe, TeacherRecipe
from rkd_deploy.train.methods.simkd import ReusedClassifier
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors, load_weights

PARTS = {"fused": "S + A", "student": "S alone", "control": "S0, same losses", "s0": "S0", "teacher": "T"}
"""fused: S + A. student: S alone, same head. control: S0 whole under T's head, by S's losses. s0: the control or
baseline with its own head, at S0's full cost. teacher: T."""


@dataclass(frozen=True)
class Networks:
    """What a recipe asks for, and None for what it does not.

    Attributes:
        teacher: T.
        s0: S0; with a projector and T's head where SimKD trains it.
        model: S, its assistants and head.
        control: S0 without assistants under an adapter and T's head.
    """

    teacher: FeatureNetwork | None
    s0: FeatureNetwork | None
    model: ResidualStudent | ProgressiveStudent | None
    control: ResidualStudent | None


def parts_of(recipe: Recipe) -> tuple[str, ...]:
    """The parts that a run of this recipe has, what it is run for first."""
    method = recipe.method
    own = ("fused", "student") if method.residual else ()
    control = ("control",) if recipe.has_control else ()
    given = ("s0",) if recipe.student.baseline else ()
    taught = method.name != "cross_entropy" or (recipe.student.fraction is not None and recipe.student.inherits)
    return own + control + given + (("teacher",) if taught else ())


def phase_of(recipe: Recipe, part: str) -> str:
    """The phase whose weights hold a part: the last one that trains it."""
    if part in ("teacher", "s0"):
        return part
    if part == "control":
        return "control" if recipe.method.end_to_end or recipe.method.classifier == "teacher" else "control_head"
    if recipe.method.scheme == "end_to_end":
        return "end_to_end"
    return assistant_phase(recipe.student.assistants) if recipe.method.classifier == "teacher" else "head"


def other_weights(recipe: Recipe) -> str | None:
    """The weights that are kept beside those that ship, as PHASE_ema or PHASE_last; None without an average."""
    if recipe.train.ema_decay is None:
        return None
    return "last" if recipe.train.ship == "ema" else "ema"


def assistant_phase(number: int) -> str:
    """Name of the phase that trains assistant i = `number`, from 1."""
    return "assistant" if number == 1 else f"assistant_{number}"


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that skipping one (on resume) does not shift another."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Fresh weights drawn inside depend on nothing but the seed and the purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose))
        yield


def _original(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """The network that S0 is, or is cut from."""
    return created(recipe.student if recipe.student.fraction is None else recipe.teacher, facts)


def needs_teacher_head(recipe: Recipe) -> bool:
    """Whether what is trained classifies by T's head, or starts from it."""
    return recipe.method.classifier != "trained" if recipe.method.residual else recipe.method.name == "simkd"


def created(table: TeacherRecipe | StudentRecipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """The network that a table names, with fresh weights, for the classes and the image size of the facts."""
    return zoo.create(table.name, len(facts["classes"]), input_size=facts["image_size"], stages=table.stages)


def linear_head(recipe: Recipe, teacher: FeatureNetwork) -> bool:
    """Whether h is one linear layer: a fresh head, and that of most teachers."""
    return not needs_teacher_head(recipe) or (type(teacher.fc) is nn.Linear and teacher.fc.bias is not None)


def _head(recipe: Recipe, facts: Mapping[str, Any]) -> nn.Module:
    """The head h with fresh weights, built as T's where T's is to be its start."""
    if zoo.is_external(recipe.teacher.name) and needs_teacher_head(recipe):
        teacher = created(recipe.teacher, facts)
        if not linear_head(recipe, teacher):
            return copy.deepcopy(cast(nn.Module, teacher.fc))
    return nn.Linear(facts["channels"], len(facts["classes"]))


def build_teacher(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """T with fresh weights."""
    with seeded(recipe.train.seed, "init/teacher"):
        return created(recipe.teacher, facts)


def build_s0(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """S0 with fresh weights; as SimKD ships it, where that is the method."""
    with seeded(recipe.train.seed, "init/s0"):
        given = _original(recipe, facts)
        if recipe.student.fraction is not None:
            given = narrowable(given, tuple(facts["image_size"])).rebuilt(facts["given_widths"], len(facts["classes"]))
        if recipe.method.name != "simkd":
            return given
        head = _head(recipe, facts)
        return ReusedClassifier(given.without_head(), facts["channels"], head, recipe.method.simkd_factor)


def build_residual(recipe: Recipe, facts: Mapping[str, Any]) -> ResidualStudent | ProgressiveStudent:
    """S and its assistants with fresh weights, at the widths of the facts."""
    classes = len(facts["classes"])
    with seeded(recipe.train.seed, "init/residual"):
        given = narrowable(_original(recipe, facts), tuple(facts["image_size"]))
        student = given.rebuilt(facts["student_widths"], None)
        assistants = [given.rebuilt(facts["assistant_widths"], None) for _ in range(recipe.student.assistants)]
        if recipe.method.scheme == "progressive":
            return progressive_student(student, assistants, facts["stage_channels"], classes, facts["image_size"])
        head, shared = _head(recipe, facts), facts.get("shared_stages")
        if shared is None:
            model = ResidualStudent(student, assistants, facts["channels"], classes, head)
        else:
            model = parted(student, assistants, shared, facts["channels"], classes, head)
        _add_stage_adapters(model, recipe, facts)
        return model


def build_control(recipe: Recipe, facts: Mapping[str, Any]) -> ResidualStudent:
    """S0 as a student without assistants, with fresh weights."""
    with seeded(recipe.train.seed, "init/control"):
        given = narrowable(_original(recipe, facts), tuple(facts["image_size"]))
        student = given.rebuilt(facts["given_widths"], None)
        model = ResidualStudent(student, (), facts["channels"], len(facts["classes"]), _head(recipe, facts))
        _add_stage_adapters(model, recipe, facts)
        return model


def _add_stage_adapters(model: ResidualStudent, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    if early := recipe.method.stages[:-1]:
        own = model.stage_channels(facts["image_size"])
        channels = [facts["stage_channels"][j - 1 - len(own[0])] for j in early]
        model.stage_adapters = StageAdapters(early, own, channels)


def build_networks(recipe: Recipe, facts: Mapping[str, Any], device: torch.device) -> Networks:
    """Every network that the recipe asks for, with fresh weights, on a device."""
    parts = parts_of(recipe)
    return Networks(
        teacher=build_teacher(recipe, facts).to(device) if "teacher" in parts else None,
        s0=build_s0(recipe, facts).to(device) if "s0" in parts else None,
        model=build_residual(recipe, facts).to(device) if "fused" in parts else None,
        control=build_control(recipe, facts).to(device) if "control" in parts else None,
    )


def load_part(run: Run, part: str, other: str | None = None) -> nn.Module:
    """One network of a run, trained, in eval mode: images to logits.

    Args:
        run: A run that has got far enough.
        part: One of `PARTS`.
        other: Not the weights that ship, but those beside them (see `other_weights`).

    Raises:
        UsageError: Unknown part.
        CheckpointError: This run has no such part, or its weights are damaged.
    """
    recipe = run.recipe
    if part not in PARTS:
        raise UsageError(unknown_name("part", part, PARTS))
    if part not in parts_of(recipe):
        raise CheckpointError(
            f"{run.folder} has no weights of phase {part!r}. It was left out by the recipe, which asks for "
            f"{', '.join(parts_of(recipe))}."
        )
    facts = run.read_json("facts.json")
    if part in ("teacher", "s0"):
        module = build_teacher(recipe, facts) if part == "teacher" else build_s0(recipe, facts)
        return _restored(run, _weights_name(part, other), module)
    build = build_control if part == "control" else build_residual
    model = _restored(run, _weights_name(phase_of(recipe, part), other), build(recipe, facts))
    assert isinstance(model, ResidualStudent | ProgressiveStudent)
    if isinstance(model, ResidualStudent):
        model.stage_adapters = None  # learnt along, for training only
    return student_alone(model).eval() if part == "student" else model


def student_alone(model: ResidualStudent | ProgressiveStudent) -> nn.Module:
    """S without its assistants, under the same head."""
    return model.alone() if isinstance(model, ProgressiveStudent) else StudentAlone(model)


def _weights_name(phase: str, other: str | None) -> str:
    return phase if other is None else f"{phase}_{other}"


def _restored(run: Run, phase: str, module: nn.Module) -> nn.Module:
    path = run.weights(phase)
    if not path.exists():
        raise CheckpointError(
            f"{run.folder} has no weights of phase {phase!r}: the run is not finished. Go on with: "
            f"{command_line('train', run.folder, '--resume')}"
        )
    state, _ = load_tensors(path)
    load_weights(module, with_norms(state, module), str(path), phase)
    return module.eval()

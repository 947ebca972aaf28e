"""Builds the networks of a run from its recipe and facts: T, S0, and S with its assistants."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rkd_deploy.errors import CheckpointError, ModelFileError, UsageError, command_line, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.progressive import ProgressiveStudent, progressive_student
from rkd_deploy.models.residual import ResidualStudent, StageAdapters, StudentAlone, with_norms
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.models.trunk import parted
from rkd_deploy.recipe import Recipe, StudentRecipe, TeacherRecipe
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.methods.simkd import ReusedClassifier
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors, load_weights

PARTS = {"fused": "S + A", "student": "S alone", "control": "S0, same losses", "s0": "S0", "teacher": "T"}
"""Name for people of every network that a run can have, by its part. control is S0 whole under T's head, trained by
S's losses; s0 is the control or the baseline with a head of its own, at S0's full cost."""


@dataclass(frozen=True)
class Networks:
    """The networks that a recipe asks for; None for those that it does not.

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
    residual = ("fused", "student") if method.residual else ()
    control = ("control",) if recipe.has_control else ()
    s0 = ("s0",) if recipe.student.baseline else ()
    needs_teacher = method.name != "cross_entropy" or (recipe.student.fraction is not None and recipe.student.inherits)
    return residual + control + s0 + (("teacher",) if needs_teacher else ())


def phase_of(recipe: Recipe, part: str) -> str:
    """Name of the phase whose weights hold a part: the last phase that trains it."""
    if part in ("teacher", "s0"):
        return part
    if part == "control":
        return "control" if recipe.method.end_to_end or recipe.method.classifier == "teacher" else "control_head"
    if recipe.method.scheme == "end_to_end":
        return "end_to_end"
    return assistant_phase(recipe.student.assistants) if recipe.method.classifier == "teacher" else "head"


def other_weights(recipe: Recipe) -> str | None:
    """Which weights lie beside those that ship, as PHASE_ema or PHASE_last; None without an average."""
    if recipe.train.ema_decay is None:
        return None
    return "last" if recipe.train.ship == "ema" else "ema"


def assistant_phase(number: int) -> str:
    """Name of the phase that trains assistant i = `number`, from 1."""
    return "assistant" if number == 1 else f"assistant_{number}"


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, so that leaving another purpose out (on resume) does not shift it."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seed PyTorch while the block runs: fresh weights depend on the seed and the purpose alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose))
        yield


@dataclass(frozen=True)
class Originals:
    """T and S0 as their tables name them, with fresh weights or a user's own: what everything else is derived from.

    An external network takes seconds to be built and traced, so a run builds each once and hands it on.

    Attributes:
        teacher: T.
        s0: S0; T itself where S0 is a fraction of it.
    """

    teacher: FeatureNetwork
    s0: FeatureNetwork


def build_originals(recipe: Recipe, classes: int, image_size: tuple[int, int]) -> Originals:
    """Build T and S0 for a number of classes and images of a height and width.

    Raises:
        UsageError: Unknown network, or one that gives another number of logits.
        MissingDependencyError: timm is not installed.
    """
    T = build_teacher(recipe, classes, image_size)
    if recipe.student.fraction is not None:
        return Originals(T, T)
    with seeded(recipe.train.seed, "init/s0"):
        return Originals(T, _create(recipe.student, classes, image_size))


def _create(table: TeacherRecipe | StudentRecipe, classes: int, image_size: tuple[int, int]) -> FeatureNetwork:
    return zoo.create(table.name, classes, input_size=image_size, stages=table.stages)


def _source_of_s0(recipe: Recipe, facts: RunFacts) -> FeatureNetwork:
    """The network that S0 is, or is narrowed from, built anew."""
    table = recipe.student if recipe.student.fraction is None else recipe.teacher
    return _create(table, len(facts.classes), facts.image_size)


def needs_teacher_head(recipe: Recipe) -> bool:
    """Whether what is trained classifies by T's head, or starts from it."""
    return recipe.method.classifier != "trained" if recipe.method.residual else recipe.method.name == "simkd"


def linear_head(recipe: Recipe, teacher: FeatureNetwork) -> bool:
    """Whether h is one linear layer: a fresh head, and that of most teachers."""
    return not needs_teacher_head(recipe) or (type(teacher.fc) is nn.Linear and teacher.fc.bias is not None)


def _head(recipe: Recipe, facts: RunFacts, originals: Originals | None) -> nn.Module:
    """The head h with fresh weights; a copy of T's where that is to be its start and is no single linear layer."""
    if zoo.is_external(recipe.teacher.name) and needs_teacher_head(recipe):
        T = originals.teacher if originals else _create(recipe.teacher, len(facts.classes), facts.image_size)
        if not linear_head(recipe, T):
            return copy.deepcopy(cast(nn.Module, T.fc))
    return nn.Linear(facts.channels, len(facts.classes))


def build_teacher(recipe: Recipe, classes: int, image_size: tuple[int, int]) -> FeatureNetwork:
    """Build T with fresh weights."""
    with seeded(recipe.train.seed, "init/teacher"):
        return _create(recipe.teacher, classes, image_size)


def build_s0(recipe: Recipe, facts: RunFacts, originals: Originals | None = None) -> FeatureNetwork:
    """Build S0 with fresh weights; with SimKD's projector and head where that is the method.

    Args:
        recipe: The whole run.
        facts: Classes, image size and widths.
        originals: T and S0, where they are built already; S0 is used and not copied.

    Raises:
        ModelFileError: The facts lack the widths of a narrowed S0.
    """
    if originals is not None and recipe.student.fraction is None and recipe.method.name != "simkd":
        return originals.s0
    # Everything below draws from one stream of random numbers, so the source is built again: a resumed run, which may
    # have no originals, has to draw the same weights.
    with seeded(recipe.train.seed, "init/s0"):
        s0 = _source_of_s0(recipe, facts)
        if recipe.student.fraction is not None:
            widths = _present("given_widths", facts.given_widths)
            s0 = narrowable(s0, facts.image_size).rebuilt(widths, len(facts.classes))
        if recipe.method.name != "simkd":
            return s0
        head = _head(recipe, facts, originals)
        return ReusedClassifier(s0.without_head(), facts.channels, head, recipe.method.simkd_factor)


def build_residual(
    recipe: Recipe, facts: RunFacts, originals: Originals | None = None, head: nn.Module | None = None
) -> ResidualStudent | ProgressiveStudent:
    """Build S and its assistants with fresh weights, at the widths of the facts.

    Args:
        recipe: The whole run.
        facts: Classes, image size, channels and widths.
        originals: T and S0, where they are built already; both are left as they are.
        head: The head h, where it is known already; else it is made as the recipe says, from T where it is T's.

    Raises:
        ModelFileError: The facts lack widths or channels of a stage.
    """
    classes, size = len(facts.classes), facts.image_size
    widths = [_present("student_widths", facts.student_widths)]
    widths += [_present("assistant_widths", facts.assistant_widths)] * recipe.student.assistants
    with seeded(recipe.train.seed, "init/residual"):
        # One stream of random numbers for all of it: the order of these lines is a part of what a seed means.
        s0 = narrowable(_source_of_s0(recipe, facts), size)
        student, *assistants = [s0.rebuilt(branch, None) for branch in widths]
        if recipe.method.scheme == "progressive":
            channels = _present("stage_channels", facts.stage_channels)
            return progressive_student(student, assistants, channels, classes, size)
        head, shared = head or _head(recipe, facts, originals), facts.shared_stages
        if shared is None:
            model = ResidualStudent(student, assistants, facts.channels, classes, head)
        else:
            model = parted(student, assistants, shared, facts.channels, classes, head)
        _add_stage_adapters(model, recipe, facts)
        return model


def build_control(
    recipe: Recipe, facts: RunFacts, originals: Originals | None = None, head: nn.Module | None = None
) -> ResidualStudent:
    """Build S0 as a student without assistants, with fresh weights; arguments and errors as for `build_residual`."""
    with seeded(recipe.train.seed, "init/control"):
        s0 = narrowable(_source_of_s0(recipe, facts), facts.image_size)
        student = s0.rebuilt(_present("given_widths", facts.given_widths), None)
        head = head or _head(recipe, facts, originals)
        model = ResidualStudent(student, (), facts.channels, len(facts.classes), head)
        _add_stage_adapters(model, recipe, facts)
        return model


def _add_stage_adapters(model: ResidualStudent, recipe: Recipe, facts: RunFacts) -> None:
    if early := recipe.method.stages[:-1]:
        of_branches = model.stage_channels(facts.image_size)
        of_T = _present("stage_channels", facts.stage_channels)
        channels_T = [of_T[stage - 1 - len(of_branches[0])] for stage in early]
        model.stage_adapters = StageAdapters(early, of_branches, channels_T)


def _present(key: str, value: tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        raise ModelFileError(
            f"facts.json has no {key}, and networks of this recipe are built by it: recipe.toml or facts.json is of "
            "another run. Restore the folder from a copy, or train again."
        )
    return value


def build_networks(recipe: Recipe, facts: RunFacts, originals: Originals, device: torch.device) -> Networks:
    """Build every network that the recipe asks for, with fresh weights, on a device.

    Args:
        recipe: The whole run.
        facts: Classes, image size, channels and widths.
        originals: T and S0; used, not copied.
        device: Where the networks go.
    """
    parts = parts_of(recipe)
    # T goes to the device last: S and A may take copies of its head.
    model = build_residual(recipe, facts, originals) if "fused" in parts else None
    control = build_control(recipe, facts, originals) if "control" in parts else None
    s0 = build_s0(recipe, facts, originals) if "s0" in parts else None
    return Networks(
        teacher=originals.teacher.to(device) if "teacher" in parts else None,
        s0=None if s0 is None else s0.to(device),
        model=None if model is None else model.to(device),
        control=None if control is None else control.to(device),
    )


def load_part(run: Run, part: str, other: str | None = None) -> nn.Module:
    """Load one trained network of a run, in eval mode: images to logits.

    Args:
        run: A run whose phase of this part is done.
        part: One of `PARTS`.
        other: Load the weights of this name beside those that ship (`other_weights`).

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
    facts = run.facts
    if part in ("teacher", "s0"):
        classes, size = len(facts.classes), facts.image_size
        module = build_teacher(recipe, classes, size) if part == "teacher" else build_s0(recipe, facts)
        phase = _weights_name(part, other)
        return _with_weights(module, *_stored(run, phase), phase)
    build, phase = build_control if part == "control" else build_residual, _weights_name(phase_of(recipe, part), other)
    path, state = _stored(run, phase)
    # Its weights replace whatever is drawn here, so that T need not be built again for a head of one linear layer.
    model = _with_weights(build(recipe, facts, head=_linear_head(state, facts)), path, state, phase)
    assert isinstance(model, ResidualStudent | ProgressiveStudent)
    if isinstance(model, ResidualStudent):
        model.stage_adapters = None  # learnt along, for training only
    return student_alone(model).eval() if part == "student" else model


def student_alone(model: ResidualStudent | ProgressiveStudent) -> nn.Module:
    """S without its assistants, under the same head."""
    return model.alone() if isinstance(model, ProgressiveStudent) else StudentAlone(model)


def _weights_name(phase: str, other: str | None) -> str:
    return phase if other is None else f"{phase}_{other}"


def _linear_head(state: Mapping[str, Tensor], facts: RunFacts) -> nn.Linear | None:
    """A fresh head for stored weights; None where theirs is more than one linear layer."""
    is_linear = {name for name in state if name.startswith("head.")} == {"head.weight", "head.bias"}
    return nn.Linear(facts.channels, len(facts.classes)) if is_linear and state["head.weight"].dim() == 2 else None


def _stored(run: Run, phase: str) -> tuple[Path, dict[str, Tensor]]:
    """The file with the weights of a phase, and what is in it."""
    path = run.weights(phase)
    if not path.exists():
        raise CheckpointError(
            f"{run.folder} has no weights of phase {phase!r}: the run is not finished. Go on with: "
            f"{command_line('train', run.folder, '--resume')}"
        )
    run.check_file(path)
    return path, load_tensors(path)[0]


def _with_weights(module: nn.Module, path: Path, state: dict[str, Tensor], phase: str) -> nn.Module:
    load_weights(module, with_norms(state, module), str(path), phase)
    return module.eval()

"""The networks of a run: T, S0, and S with its assistants, built from its recipe and its facts."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rkd_deploy.data.pictures import SHOWN
from rkd_deploy.data.sources import ImageSet
from rkd_deploy.errors import CheckpointError, RecipeError, UsageError, unknown_name
from rkd_deploy.export.latency import ExportStopwatch
from rkd_deploy.models import catalogues, zoo
from rkd_deploy.models.external import External
from rkd_deploy.models.progressive import ProgressiveStudent, paired_channels, progressive_student
from rkd_deploy.models.pruned import narrowable
from rkd_deploy.models.residual import ResidualStudent, StageAdapters, StudentAlone
from rkd_deploy.models.separation import narrow, separate
from rkd_deploy.models.staged import FeatureNetwork, Staged, stage_shapes
from rkd_deploy.recipe import DataRecipe, Recipe, StudentRecipe, TeacherRecipe
from rkd_deploy.train.checkpoint import load_foreign, load_tensors, load_weights
from rkd_deploy.train.methods.simkd import ReusedClassifier
from rkd_deploy.train.runs import Run

PARTS = ("fused", "student", "s0", "teacher")
"""fused: S + A. student: S alone, same head. s0: the control or baseline at S0's full cost. teacher: T."""


@dataclass(frozen=True)
class Networks:
    """What a recipe asks for, and None for what it does not.

    Attributes:
        teacher: T.
        given: S0; with a projector and T's head where SimKD trains it.
        model: S, its assistants and head.
    """

    teacher: FeatureNetwork | None
    given: FeatureNetwork | None
    model: ResidualStudent | ProgressiveStudent | None


def parts_of(recipe: Recipe) -> tuple[str, ...]:
    """The parts that a run of this recipe has, what it is run for first."""
    method = recipe.method
    own = ("fused", "student") if method.residual else ()
    given = ("s0",) if recipe.student.baseline else ()
    taught = method.name != "cross_entropy" or (recipe.student.fraction is not None and recipe.student.inherits)
    return own + given + (("teacher",) if taught else ())


def phase_of(recipe: Recipe, part: str) -> str:
    """The phase whose weights hold a part: the last one that trains it."""
    if part in ("teacher", "s0"):
        return part
    if recipe.method.scheme == "end_to_end":
        return "end_to_end"
    return assistant_phase(recipe.student.assistants) if recipe.method.head == "teacher" else "head"


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


def data_of(recipe: Recipe, run: Run | None = None) -> DataRecipe:
    """Table `[data]` with the normalisation filled in, where it is not measured here for the first time.

    Args:
        recipe: Says whose normalisation it is.
        run: One that has begun: what was measured or read for it stands in its facts, and is not looked for again.

    Raises:
        RecipeError: It is to be the teacher's, and nothing states that.
        CheckpointError: The teacher's weights are missing or damaged.
    """
    stated: Mapping[str, Any]
    if run is not None and (recipe.data.of_files or recipe.data.normalisation == "teacher"):
        stated = run.read_json("facts.json")
    elif recipe.data.normalisation == "teacher":
        stated = _teacher_normalisation(recipe)
    else:
        return recipe.data
    mean, std = tuple(stated["mean"]), tuple(stated["std"])
    return dataclasses.replace(recipe.data, mean=mean, std=std, normalisation="data")


def _teacher_normalisation(recipe: Recipe) -> dict[str, Any]:
    teacher = recipe.teacher
    own = {} if teacher.checkpoint is None else load_foreign(Path(teacher.checkpoint))[1]
    stated = {key: getattr(teacher, key) or own.get(key) for key in ("mean", "std")}
    if not all(stated.values()):
        raise RecipeError(
            f'data.normalisation = "teacher", and {teacher.checkpoint} does not say how its images were normalised. '
            "Set teacher.mean and teacher.std, or leave data.normalisation out."
        )
    return stated


def gather_facts(recipe: Recipe, images: ImageSet, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What building the networks needs and the recipe does not say; written to facts.json.

    Args:
        recipe: What is asked for.
        images: What it is trained on.
        note: Told what is being measured, where the budget is latency.

    Raises:
        BudgetError: No S and A fit.
        UsageError: Unknown network.
        RecipeError: T's head cannot be reused.
    """
    facts: dict[str, Any] = {
        "data": images.name,
        "classes": list(images.classes),
        "mean": list(images.mean),
        "std": list(images.std),
        "image_size": list(images.image_size),
        "images": {name: len(getattr(images, name)) for name in ("train", "val", "test")},
    }
    if images.sources:
        facts |= {"crop_fraction": images.crop_fraction, "sources": dict(images.sources)}
        facts |= {"skipped": len(images.skipped), "first_skipped": list(images.skipped[:SHOWN])}
    teacher = _created(recipe.teacher, facts)
    facts["channels"] = teacher.channels
    given = teacher if recipe.student.fraction is not None else _created(recipe.student, facts)
    for table, network in (("teacher", teacher), ("student", given)):
        if isinstance(network, External):
            facts[f"{table}_stages"] = list(network.stages)
    if needs_teacher_head(recipe):
        _check_head(recipe, teacher)
    if recipe.method.scheme == "progressive" or recipe.method.stages:
        facts["stage_channels"] = _stage_channels(recipe, images, teacher, given)
    with _stopwatch(recipe, images, note) as stopwatch:
        if recipe.method.residual:
            return facts | _separation_facts(recipe, images, facts, teacher, given, stopwatch)
        if recipe.student.fraction is not None:
            facts["given_widths"] = list(_given_widths(recipe, images, teacher, stopwatch))
    return facts


def _stage_channels(recipe: Recipe, images: ImageSet, T: FeatureNetwork, S0: FeatureNetwork) -> list[int]:
    """Channels of T's stage maps that have a partner among S's, counted from the deepest."""
    if recipe.method.scheme == "progressive":
        narrowable(S0, images.image_size).stages()  # refuses here what cannot be cut
    maps_T, maps_S0 = (stage_shapes(network, images.image_size) for network in (T, S0))
    channels, stages, last = paired_channels(maps_T, maps_S0), recipe.method.stages, len(maps_S0)
    first = last - len(channels) + 1
    if stages and (stages[0] < first or stages[-1] != last):
        raise RecipeError(
            f"method.stages = {list(stages)}: {recipe.student.name} has stages 1 to {last}, of which {first} to {last} "
            f"have a partner in {recipe.teacher.name}. Name any of these, and {last} among them: its map is classified."
        )
    return channels


@contextmanager
def _stopwatch(
    recipe: Recipe, images: ImageSet, note: Callable[[str], None] | None
) -> Iterator[ExportStopwatch | None]:
    """What measures, where anything is measured."""
    student = recipe.student
    if student.budget != "latency" or not (recipe.method.residual or student.fraction is not None):
        yield None
        return
    with ExportStopwatch(
        student.backend or "onnxruntime",
        student.latency_batches or (1, 8),
        input_size=images.image_size,
        threads=student.latency_threads,
        note=note,
    ) as stopwatch:
        yield stopwatch


def _given_widths(
    recipe: Recipe, images: ImageSet, teacher: FeatureNetwork, stopwatch: ExportStopwatch | None
) -> tuple[int, ...]:
    """Widths of an S0 that is a fraction of the teacher and is not split."""
    assert recipe.student.fraction is not None
    return narrow(
        teacher,
        recipe.student.fraction,
        num_classes=len(images.classes),
        input_size=images.image_size,
        budget=recipe.student.budget,
        round_to=recipe.student.round_to,
        stopwatch=stopwatch,
    )


def _original(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """The network that S0 is, or is cut from."""
    return _created(recipe.student if recipe.student.fraction is None else recipe.teacher, facts)


def needs_teacher_head(recipe: Recipe) -> bool:
    """Whether what is trained classifies by T's head, or starts from it."""
    return recipe.method.head != "trained" if recipe.method.residual else recipe.method.name == "simkd"


def _check_head(recipe: Recipe, teacher: FeatureNetwork) -> None:
    if recipe.method.scheme == "progressive" and not _linear_head(recipe, teacher):
        raise RecipeError(
            f'method.scheme = "progressive" needs a linear head, and that of {recipe.teacher.name} is another. '
            'Set method.head = "trained".'
        )
    if teacher.fc is None:
        what, instead = (
            (f'method.head = "{recipe.method.head}"', 'Set method.head = "trained".')
            if recipe.method.residual
            else ('method.name = "simkd"', "Choose another method, or another teacher.")
        )
        raise RecipeError(
            f"{what} classifies pooled maps by T's head, and the logits of {recipe.teacher.name} are no function of "
            f"its pooled last map (a class token, a flattened map, another layer in between). {instead}"
        )


def _separation_facts(
    recipe: Recipe,
    images: ImageSet,
    facts: Mapping[str, Any],
    teacher: FeatureNetwork,
    given: FeatureNetwork,
    stopwatch: ExportStopwatch | None,
) -> dict[str, Any]:
    separation = separate(
        # By its name where it has one, which is the same each time: tests remember separations.
        recipe.student.name if isinstance(given, Staged) and given is not teacher else given,
        num_classes=len(images.classes),
        input_size=images.image_size,
        budget=recipe.student.budget,
        assistant_share=recipe.student.assistant_share,
        assistants=recipe.student.assistants,
        round_to=recipe.student.round_to,
        channels=teacher.channels,
        head=None if _linear_head(recipe, teacher) else teacher.fc,
        fraction=recipe.student.fraction,
        stopwatch=stopwatch,
        stage_channels=tuple(facts["stage_channels"]) if recipe.method.scheme == "progressive" else None,
    )
    return {
        "given_widths": list(separation.given_widths),
        "student_widths": list(separation.student.widths),
        "assistant_widths": list(separation.assistant.widths),
        "separation": {
            "unit": separation.unit,
            "budget": separation.budget,
            "cost": separation.cost,
            "parts": separation.parts,
            "latency": separation.latency,
        },
    }


def _created(table: TeacherRecipe | StudentRecipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    return zoo.create(table.name, len(facts["classes"]), input_size=facts["image_size"], stages=table.stages)


def _linear_head(recipe: Recipe, teacher: FeatureNetwork) -> bool:
    """Whether h is one linear layer: a fresh head, and that of most teachers."""
    return not needs_teacher_head(recipe) or (type(teacher.fc) is nn.Linear and teacher.fc.bias is not None)


def _head(recipe: Recipe, facts: Mapping[str, Any]) -> nn.Module:
    """The head h with fresh weights, built as T's where T's is to be its start."""
    if catalogues.is_external(recipe.teacher.name) and needs_teacher_head(recipe):
        teacher = _created(recipe.teacher, facts)
        if not _linear_head(recipe, teacher):
            return copy.deepcopy(cast(nn.Module, teacher.fc))
    return nn.Linear(facts["channels"], len(facts["classes"]))


def build_teacher(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
    """T with fresh weights."""
    with seeded(recipe.train.seed, "init/teacher"):
        return _created(recipe.teacher, facts)


def build_given(recipe: Recipe, facts: Mapping[str, Any]) -> FeatureNetwork:
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
        model = ResidualStudent(student, assistants, facts["channels"], classes, _head(recipe, facts))
        if early := recipe.method.stages[:-1]:
            own = [[shape[0] for shape in stage_shapes(one, facts["image_size"])] for one in (student, *assistants)]
            channels = [facts["stage_channels"][j - 1 - len(own[0])] for j in early]
            model.stage_adapters = StageAdapters(early, own, channels)
        return model


def build_networks(recipe: Recipe, facts: Mapping[str, Any], device: torch.device) -> Networks:
    """Every network that the recipe asks for, with fresh weights, on a device."""
    parts = parts_of(recipe)
    return Networks(
        teacher=build_teacher(recipe, facts).to(device) if "teacher" in parts else None,
        given=build_given(recipe, facts).to(device) if "s0" in parts else None,
        model=build_residual(recipe, facts).to(device) if "fused" in parts else None,
    )


def load_given_weights(
    module: nn.Module, table: str, checkpoint: str, recipe: Recipe, facts: Mapping[str, Any]
) -> bool:
    """Load the checkpoint that a recipe names for T or S0.

    Args:
        module: Receives the weights.
        table: ``"teacher"`` or ``"student"``.
        checkpoint: Path of the file.
        recipe: For the normalisation it states.
        facts: Classes and normalisation of the data.

    Returns:
        Whether the normalisation the weights expect is known, from the file or the recipe.

    Raises:
        CheckpointError: Missing, damaged or foreign; other classes than the data.
        RecipeError: Another normalisation than that of the data.
    """
    name = getattr(recipe, table).name
    state, own = load_foreign(Path(checkpoint))
    load_weights(module.network if isinstance(module, External) else module, state, checkpoint, f"{table} {name}")
    if own.get("classes") not in (None, facts["classes"]):
        theirs, ours = own["classes"], facts["classes"]
        index = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than the data: class {index} is {theirs[index]!r} there and "
            f"{ours[index]!r} here. Use the data it was trained on."
        )
    stated = {key: getattr(recipe.teacher, key) if table == "teacher" else None for key in ("mean", "std")}
    known = {key: own.get(key) or stated[key] for key in ("mean", "std")}
    check_normalisation(f"{table} {name}", known, facts)
    return all(value is not None for value in known.values())


def load_published_weights(module: nn.Module, table: str, name: str, facts: Mapping[str, Any]) -> bool:
    """Load the weights that torchvision or timm publish for T or S0.

    Args:
        module: An `External`; its classifier stays fresh where the data have another number of classes.
        table: ``"teacher"`` or ``"student"``.
        name: Of the network.
        facts: Normalisation of the data.

    Returns:
        Whether the classifier is among the weights: else the network has to be trained first.

    Raises:
        CheckpointError: There are none, or they could not be fetched.
        RecipeError: Another normalisation than that of the data.
    """
    assert isinstance(module, External)
    weights = catalogues.published(name, module.network)
    check_normalisation(f"{table} {name}", {"mean": weights.mean, "std": weights.std}, facts)
    module.network.load_state_dict({**module.network.state_dict(), **weights.state})
    return weights.complete


def check_normalisation(what: str, expected: Mapping[str, Sequence[float] | None], facts: Mapping[str, Any]) -> None:
    """Refuse weights that expect images of another normalisation than the data's.

    Args:
        what: The network, for the message.
        expected: mean and std, None where they are not known.
        facts: Normalisation of the data.

    Raises:
        RecipeError: They do.
    """
    for key, value in expected.items():
        if value is not None and max(abs(a - b) for a, b in zip(value, facts[key], strict=True)) > 1e-3:
            raise RecipeError(
                f"{what} expects images normalised with {key} {list(value)}; the data use {facts[key]}. "
                f"Use the {what.split()[0]}'s: --set 'data.{key}={list(value)}'"
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
        module = build_teacher(recipe, facts) if part == "teacher" else build_given(recipe, facts)
        return _restored(run, _weights_name(part, other), module)
    model = _restored(run, _weights_name(phase_of(recipe, part), other), build_residual(recipe, facts))
    assert isinstance(model, ResidualStudent | ProgressiveStudent)
    if isinstance(model, ResidualStudent):
        model.stage_adapters = None  # learnt along, for training only
    return model if part == "fused" else student_alone(model).eval()


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
            f"rkd-deploy train {run.folder} --resume"
        )
    state, _ = load_tensors(path)
    load_weights(module, state, str(path), phase)
    return module.eval()

"""The networks of a run: T, S0, and S with its assistants, built from its recipe and its facts."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkd_deploy.data.sources import ImageSet
from rkd_deploy.errors import CheckpointError, RecipeError, UsageError, unknown_name
from rkd_deploy.export.latency import ExportStopwatch
from rkd_deploy.models import zoo
from rkd_deploy.models.pruned import narrowable
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.separation import narrow, separate
from rkd_deploy.models.staged import FeatureNetwork, Staged
from rkd_deploy.recipe import Recipe
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

    teacher: Staged | None
    given: Staged | ReusedClassifier | None
    model: ResidualStudent | None


def parts_of(recipe: Recipe) -> tuple[str, ...]:
    """The parts that a run of this recipe has, what it is run for first."""
    method = recipe.method
    own = ("fused", "student") if method.residual else ()
    given = ("s0",) if recipe.student.baseline else ()
    taught = method.name != "cross_entropy" or (recipe.student.fraction is not None and recipe.student.inherits)
    return own + given + (("teacher",) if taught else ())


def phase_of(recipe: Recipe, part: str) -> str:
    """The phase whose weights hold a part."""
    if part in ("teacher", "s0"):
        return part
    if recipe.method.scheme == "end_to_end":
        return "end_to_end"
    return assistant_phase(recipe.student.assistants) if recipe.method.head == "teacher" else "head"


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


def gather_facts(recipe: Recipe, images: ImageSet, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What building the networks needs and the recipe does not say; written to facts.json.

    Args:
        recipe: What is asked for.
        images: What it is trained on.
        note: Told what is being measured, where the budget is latency.

    Raises:
        BudgetError: No S and A fit.
        UsageError: Unknown network.
    """
    classes = len(images.classes)
    facts: dict[str, Any] = {
        "data": images.name,
        "classes": list(images.classes),
        "mean": list(images.mean),
        "std": list(images.std),
        "image_size": list(images.image_size),
        "images": {name: len(getattr(images, name)) for name in ("train", "val", "test")},
        "channels": zoo.create(recipe.teacher.name, classes).channels,
    }
    with contextlib.ExitStack() as stack:
        stopwatch = stack.enter_context(_stopwatch(recipe, images, note)) if _measures(recipe) else None
        if recipe.method.residual:
            return facts | _separation_facts(recipe, images, facts["channels"], stopwatch)
        if recipe.student.fraction is not None:
            facts["given_widths"] = list(_given_widths(recipe, images, stopwatch))
        return facts


def _measures(recipe: Recipe) -> bool:
    return recipe.student.budget == "latency" and (recipe.method.residual or recipe.student.fraction is not None)


def _stopwatch(recipe: Recipe, images: ImageSet, note: Callable[[str], None] | None) -> ExportStopwatch:
    student = recipe.student
    return ExportStopwatch(
        student.backend or "onnxruntime",
        student.latency_batches or (1, 8),
        input_size=images.image_size,
        threads=student.latency_threads,
        note=note,
    )


def _given_widths(recipe: Recipe, images: ImageSet, stopwatch: ExportStopwatch | None) -> tuple[int, ...]:
    """Widths of an S0 that is a fraction of the teacher and is not split."""
    assert recipe.student.fraction is not None
    return narrow(
        _original(recipe, len(images.classes)),
        recipe.student.fraction,
        num_classes=len(images.classes),
        input_size=images.image_size,
        budget=recipe.student.budget,
        round_to=recipe.student.round_to,
        stopwatch=stopwatch,
    )


def _original(recipe: Recipe, classes: int) -> FeatureNetwork:
    """The network that S0 is, or is cut from."""
    name = recipe.teacher.name if recipe.student.fraction is not None else recipe.student.name
    return zoo.create(name, classes)


def _separation_facts(
    recipe: Recipe, images: ImageSet, channels: int, stopwatch: ExportStopwatch | None
) -> dict[str, Any]:
    student = recipe.student
    separation = separate(
        recipe.teacher.name if student.fraction is not None else student.name,
        num_classes=len(images.classes),
        input_size=images.image_size,
        budget=student.budget,
        assistant_share=student.assistant_share,
        assistants=student.assistants,
        round_to=student.round_to,
        channels=channels,
        fraction=student.fraction,
        stopwatch=stopwatch,
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


def build_teacher(recipe: Recipe, facts: Mapping[str, Any]) -> Staged:
    """T with fresh weights."""
    with seeded(recipe.train.seed, "init/teacher"):
        return zoo.create(recipe.teacher.name, len(facts["classes"]))


def build_given(recipe: Recipe, facts: Mapping[str, Any]) -> Staged | ReusedClassifier:
    """S0 with fresh weights; as SimKD ships it, where that is the method."""
    classes = len(facts["classes"])
    with seeded(recipe.train.seed, "init/s0"):
        given = _original(recipe, classes)
        if recipe.student.fraction is not None:
            given = narrowable(given, tuple(facts["image_size"])).rebuilt(facts["given_widths"], classes)
        if recipe.method.name != "simkd":
            return given
        backbone = given.without_head()
        return ReusedClassifier(backbone, facts["channels"], classes, recipe.method.simkd_factor)


def build_residual(recipe: Recipe, facts: Mapping[str, Any]) -> ResidualStudent:
    """S and its assistants with fresh weights, at the widths of the facts."""
    with seeded(recipe.train.seed, "init/residual"):
        given = narrowable(_original(recipe, len(facts["classes"])), tuple(facts["image_size"]))
        return ResidualStudent(
            given.rebuilt(facts["student_widths"], None),
            [given.rebuilt(facts["assistant_widths"], None) for _ in range(recipe.student.assistants)],
            facts["channels"],
            len(facts["classes"]),
        )


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
    load_weights(module, state, checkpoint, f"{table} {name}")
    if own.get("classes") not in (None, facts["classes"]):
        theirs, ours = own["classes"], facts["classes"]
        index = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than the data: class {index} is {theirs[index]!r} there and "
            f"{ours[index]!r} here. Use the data it was trained on."
        )
    stated = {key: getattr(recipe.teacher, key) if table == "teacher" else None for key in ("mean", "std")}
    known = {key: own.get(key) or stated[key] for key in ("mean", "std")}
    for key, value in known.items():
        if value is not None and max(abs(a - b) for a, b in zip(value, facts[key], strict=True)) > 1e-3:
            raise RecipeError(
                f"{table} {name} expects images normalised with {key} {list(value)}; the data use {facts[key]}. "
                f"Use the {table}'s: --set 'data.{key}={list(value)}'"
            )
    return all(value is not None for value in known.values())


def load_part(run: Run, part: str) -> nn.Module:
    """One network of a run, trained, in eval mode: images to logits.

    Args:
        run: A run that has got far enough.
        part: One of `PARTS`.

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
        return _restored(run, part, module)
    model = _restored(run, phase_of(recipe, part), build_residual(recipe, facts))
    assert isinstance(model, ResidualStudent)
    return model if part == "fused" else StudentAlone(model).eval()


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

"""The facts of a run: what building its networks needs and its recipe does not say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rkd_deploy.backends import RunOn
from rkd_deploy.data.files import LISTED
from rkd_deploy.data.sources import ImageSet
from rkd_deploy.errors import RecipeError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.measuring import ExportStopwatch
from rkd_deploy.models.external import External
from rkd_deploy.models.progressive import paired_channels
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.models.separation.separate import narrow, separate
from rkd_deploy.models.staged import FeatureNetwork, Staged, stage_shapes
from rkd_deploy.recipe import DataRecipe, Recipe
from rkd_deploy.train.networks import created, linear_head, needs_teacher_head
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_foreign


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
        facts |= {"skipped": len(images.skipped), "first_skipped": list(images.skipped[:LISTED])}
    teacher = created(recipe.teacher, facts)
    facts["channels"] = teacher.channels
    given = teacher if recipe.student.fraction is not None else created(recipe.student, facts)
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
        RunOn(student.backend or "onnxruntime", threads=student.latency_threads),
        student.latency_batches or (1, 8),
        input_size=images.image_size,
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


def _check_head(recipe: Recipe, teacher: FeatureNetwork) -> None:
    if recipe.method.scheme == "progressive" and not linear_head(recipe, teacher):
        raise RecipeError(
            f'method.scheme = "progressive" needs a linear head, and that of {recipe.teacher.name} is another. '
            'Set method.head = "trained".'
        )
    if teacher.fc is None:
        what, instead = (
            (f'method.head = "{recipe.method.classifier}"', 'Set method.head = "trained".')
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
        layout=recipe.student.layout,
        shared_stages=recipe.student.shared_stages,
        assistant_share=recipe.student.assistant_share,
        assistants=recipe.student.assistants,
        round_to=recipe.student.round_to,
        channels=teacher.channels,
        head=None if linear_head(recipe, teacher) else teacher.fc,
        fraction=recipe.student.fraction,
        stopwatch=stopwatch,
        stage_channels=tuple(facts["stage_channels"]) if recipe.method.scheme == "progressive" else None,
    )
    if separation.level == "wide":  # refuses here, and not after the training, what cannot be merged
        fuse(ResidualStudent(separation.student, separation.assistants, teacher.channels, len(images.classes)), "wide")
    return {
        "given_widths": list(separation.s0_widths),
        "student_widths": list(separation.student.widths),
        "assistant_widths": list(separation.assistant.widths),
        **({"shared_stages": separation.shared_stages} if separation.shared_stages else {}),
        "separation": {
            "unit": separation.unit,
            "level": separation.level,
            "budget": separation.budget,
            "cost": separation.cost,
            "parts": separation.parts,
            "latency": separation.latency,
        },
    }

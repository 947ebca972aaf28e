"""Finds out the facts of a run before it trains: normalisation, S and A within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rkd_deploy.backends import RunOn
from rkd_deploy.data.files import LISTED
from rkd_deploy.data.sources import ImageSet
from rkd_deploy.errors import RecipeError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.stopwatch import ExportStopwatch
from rkd_deploy.models.external import External
from rkd_deploy.models.progressive import paired_channels
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import narrow, separate
from rkd_deploy.models.staged import FeatureNetwork, Staged, in_mode, stage_shapes
from rkd_deploy.models.zoo import published_normalisation
from rkd_deploy.recipe import DataRecipe, Recipe
from rkd_deploy.storage import sha256_of
from rkd_deploy.train.checkpoints import check_readable, load_checkpoint, weights_path
from rkd_deploy.train.facts import NamedFile, RunFacts, SeparationFacts, SplitSizes, WeightsFacts
from rkd_deploy.train.networks import Originals, linear_head, needs_teacher_head


def data_of(recipe: Recipe) -> DataRecipe:
    """Table `[data]` with the normalisation filled in, where it is not measured here for the first time.

    Args:
        recipe: Says whose normalisation holds.

    Raises:
        RecipeError: The teacher's normalisation is to hold, and nothing states it.
        UsageError: That of published weights is to hold, and there is no such network.
        CheckpointError: The teacher's weights are missing or damaged.
    """
    data, pretrained = recipe.data, [table for table in (recipe.teacher, recipe.student) if table.pretrained]
    if data.normalisation == "teacher":
        mean, std = _teacher_normalisation(recipe)
    elif data.normalisation is None and pretrained:
        mean, std = published_normalisation(pretrained[0].name)
        mean, std = data.mean or mean, data.std or std
    else:
        return data
    return dataclasses.replace(data, mean=mean, std=std, normalisation="data")


def _teacher_normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    teacher = recipe.teacher
    header = (
        WeightsFacts()
        if teacher.checkpoint is None
        else load_checkpoint(weights_path(teacher.checkpoint), key=teacher.checkpoint_key).facts
    )
    published = published_normalisation(teacher.name) if teacher.pretrained else (None, None)
    mean, std = teacher.mean or header.mean or published[0], teacher.std or header.std or published[1]
    if mean is None or std is None:
        raise RecipeError(
            f'data.normalisation = "teacher", and {teacher.checkpoint} does not say how its images were normalised. '
            "Set teacher.mean and teacher.std, or leave data.normalisation out."
        )
    return mean, std


def gather_facts(
    recipe: Recipe, images: ImageSet, originals: Originals, note: Callable[[str], None] | None = None
) -> RunFacts:
    """Find out what building the networks needs and the recipe does not say.

    Args:
        recipe: The whole run.
        images: What is trained on.
        originals: T and S0 of the recipe; they are left as they are.
        note: Called with a line for each measurement, where the budget is latency.

    Raises:
        BudgetError: No S and A fit.
        UsageError: A network that cannot be narrowed.
        RecipeError: T's head cannot be reused, or a stage has no partner.
        CheckpointError: A weights file that the recipe names cannot be read.
    """
    T, S0 = originals.teacher, originals.s0
    of_files: dict[str, Any] = {}
    if images.sources:
        of_files = {"crop_fraction": images.crop_fraction, "sources": dict(images.sources)}
        of_files |= {"skipped": len(images.skipped), "first_skipped": tuple(images.skipped[:LISTED])}
    if needs_teacher_head(recipe):
        _check_head(recipe, T)
    several = recipe.method.scheme == "progressive" or recipe.method.stages
    facts = RunFacts(
        data=images.name,
        classes=tuple(images.classes),
        mean=tuple(images.mean),
        std=tuple(images.std),
        image_size=images.image_size,
        images=SplitSizes(train=len(images.train), val=len(images.val), test=len(images.test)),
        **of_files,
        channels=T.channels,
        teacher_stages=tuple(T.stages) if isinstance(T, External) else None,
        student_stages=tuple(S0.stages) if isinstance(S0, External) else None,
        stage_channels=tuple(_stage_channels(recipe, images, T, S0)) if several else None,
        given=_named_files(recipe),
    )
    with _stopwatch(recipe, images, note) as stopwatch:
        if recipe.method.residual:
            return _separated(recipe, facts, originals, stopwatch)
        if recipe.student.fraction is not None:
            return dataclasses.replace(facts, given_widths=_s0_widths(recipe, images, T, stopwatch))
    return facts


def check_named_files(recipe: Recipe) -> None:
    """Refuse a recipe that names files which cannot be read, before anything is computed.

    Files that the method never reads are looked at too: a slip in a path is one, whatever the method.

    Raises:
        CheckpointError: The checkpoint or the labels of T or S0 are no file that can be read.
    """
    for table in ("teacher", "student"):
        for key in ("checkpoint", "labels"):
            if (file := getattr(getattr(recipe, table), key)) is not None:
                check_readable(weights_path(file), f"{table}.{key}")


def _named_files(recipe: Recipe) -> dict[str, NamedFile]:
    """Weights files that the recipe names, with their checksums; the run goes by its own copies from then on."""
    named = {"teacher": recipe.teacher.checkpoint, "s0": recipe.student.checkpoint}
    paths = {name: weights_path(checkpoint) for name, checkpoint in named.items() if checkpoint is not None}
    return {name: NamedFile(file=path.name, sha256=sha256_of(path)) for name, path in paths.items()}


def _stage_channels(recipe: Recipe, images: ImageSet, T: FeatureNetwork, S0: FeatureNetwork) -> list[int]:
    """Channels of T's stage maps that have a partner among S's, counted from the deepest."""
    if recipe.method.scheme == "progressive":
        if not isinstance(S0, Staged):
            raise RecipeError(
                f'method.scheme = "progressive" needs an S0 of a built-in family, and {recipe.student.name} is none: '
                'the adapters between its stages have no price at other widths. Use method.scheme = "sequential" or '
                '"end_to_end".'
            )
        S0.stages()  # refuses here what cannot be cut
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
    """The stopwatch for latencies while the block runs; None where the recipe measures none."""
    student = recipe.student
    if student.budget != "latency" or not (recipe.method.residual or student.fraction is not None):
        yield None
        return
    with ExportStopwatch(
        RunOn(student.backend or "onnxruntime", device=student.latency_device, threads=student.latency_threads),
        student.latency_batches or (1, 8),
        input_size=images.image_size,
        note=note,
    ) as stopwatch:
        yield stopwatch


def _s0_widths(
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
    if recipe.method.residual and not _takes_any_sign(teacher):
        raise RecipeError(
            f"T's head of {recipe.teacher.name} is not defined for pooled maps with negative numbers (it takes a root "
            "or a logarithm of them, as GeM pooling does), and the sum of the maps of S and A has some. "
            'Set method.head = "trained".'
        )


@torch.no_grad()
def _takes_any_sign(teacher: FeatureNetwork) -> bool:
    """Whether T's head gives finite logits for pooled maps of either sign."""
    assert teacher.fc is not None
    like = next(teacher.parameters())
    pooled_NC = torch.randn(8, teacher.channels, generator=torch.Generator().manual_seed(0)).to(like)
    with in_mode(teacher.fc, False):
        return bool(teacher.fc(pooled_NC).isfinite().all())


def _separated(recipe: Recipe, facts: RunFacts, originals: Originals, stopwatch: ExportStopwatch | None) -> RunFacts:
    """The facts with the widths of S and A and the account of the budget."""
    T, S0 = originals.teacher, originals.s0
    separation = separate(
        # By its name where it has one, which is the same each time: tests remember separations.
        recipe.student.name if isinstance(S0, Staged) and S0 is not T else S0,
        num_classes=len(facts.classes),
        input_size=facts.image_size,
        budget=recipe.student.budget,
        layout=recipe.student.layout,
        shared_stages=recipe.student.shared_stages,
        assistant_share=recipe.student.assistant_share,
        assistants=recipe.student.assistants,
        round_to=recipe.student.round_to,
        channels=T.channels,
        head=None if linear_head(recipe, T) else T.fc,
        fraction=recipe.student.fraction,
        stopwatch=stopwatch,
        stage_channels=facts.stage_channels if recipe.method.scheme == "progressive" else None,
    )
    if separation.level == "wide":  # refuses here, and not after the training, what cannot be merged
        fuse(ResidualStudent(separation.student, separation.assistants, T.channels, len(facts.classes)), "wide")
    return dataclasses.replace(
        facts,
        given_widths=separation.s0_widths,
        student_widths=separation.student.widths,
        assistant_widths=separation.assistant.widths,
        shared_stages=separation.shared_stages or None,
        separation=SeparationFacts(
            unit=separation.unit,
            level=separation.level,
            budget=separation.budget,
            cost=separation.cost,
            parts=separation.parts,
            latency=separation.latency,
        ),
    )

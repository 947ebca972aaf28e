"""Weights that T or S0 begin with: those of a file, and those that torchvision and timm publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rkd_deploy.errors import CheckpointError, RecipeError
from rkd_deploy.models import catalogues
from rkd_deploy.models.external import External
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.checkpoint import load_foreign, load_weights


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

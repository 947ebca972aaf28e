"""Loads the weights that T and S0 start from, in the order of the data's classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from torch import nn

from rkd_deploy.errors import CheckpointError, RecipeError
from rkd_deploy.models import zoo
from rkd_deploy.models.external import External
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.checkpoints import load_checkpoint, read_labels, reorder_classes, weights_path
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.weights import load_weights


def load_weights_from(
    module: nn.Module, table: str, checkpoint: str, recipe: Recipe, facts: RunFacts, note: Callable[[str], None]
) -> bool:
    """Load the checkpoint that a recipe names for T or S0, with its classes put into the data's order.

    Args:
        module: Receives the weights.
        table: ``"teacher"`` or ``"student"``.
        checkpoint: Path of the file.
        recipe: For the set of weights, the labels and the normalisation it states.
        facts: Classes and normalisation of the data.
        note: Called with a line about what was chosen or changed.

    Returns:
        Whether the normalisation the weights expect is known, from the file or the recipe.

    Raises:
        CheckpointError: Missing, damaged or foreign; other classes than the data.
        RecipeError: Another normalisation than that of the data.
    """
    settings, network = getattr(recipe, table), module.network if isinstance(module, External) else module
    read = load_checkpoint(weights_path(checkpoint), network.state_dict().keys(), settings.checkpoint_key)
    if read.others and settings.checkpoint_key is None:
        note(
            f"{checkpoint} holds several sets of weights: {read.chosen} was taken and not {', '.join(read.others)}; "
            f"{table}.checkpoint_key names another."
        )
    load_weights(network, read.state, checkpoint, f"{table} {settings.name}")
    names = read.facts.classes if settings.labels is None else read_labels(weights_path(settings.labels))
    if names is not None and names != facts.classes:
        _match_classes(module, checkpoint, names, facts, settings.labels or "by its header")
        note(f"{checkpoint} has the classes in another order than the data: its classifier was put into theirs.")
    stated = {key: getattr(recipe.teacher, key) if table == "teacher" else None for key in ("mean", "std")}
    known = {key: getattr(read.facts, key) or stated[key] for key in ("mean", "std")}
    check_normalisation(f"{table} {settings.name}", known, facts)
    return all(value is not None for value in known.values())


def _match_classes(module: nn.Module, checkpoint: str, names: Sequence[str], facts: RunFacts, source: str) -> None:
    """Put a classifier whose classes have these names into the order of the data."""
    if len(names) != len(facts.classes):
        raise CheckpointError(
            f"{checkpoint} is for {len(names)} classes ({source}); the data have {len(facts.classes)}. Name each class "
            "of the data once, in the order of the logits, or use the data it was trained on."
        )
    if sorted(names) != sorted(facts.classes):
        pairs = zip_longest(names, facts.classes, fillvalue="none")
        index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than the data: class {index} is {theirs!r} there and {ours!r} "
            "here. Use the data it was trained on."
        )
    if not reorder_classes(module, [names.index(name) for name in facts.classes], facts.image_size):
        raise CheckpointError(
            f"{checkpoint} has the classes of the data in another order, and its classifier is no single layer with a "
            "row for each class, which could be sorted. Name the class folders so that they sort in its order."
        )


def load_published_weights(module: nn.Module, table: str, name: str, facts: RunFacts) -> bool:
    """Load the weights that torchvision or timm publish for T or S0.

    Args:
        module: An `External`; its classifier stays fresh where the data have another number of classes.
        table: ``"teacher"`` or ``"student"``.
        name: Name of the network.
        facts: Normalisation of the data.

    Returns:
        Whether the classifier is among the weights: else the network has to be trained first.

    Raises:
        CheckpointError: There are none, or they could not be fetched.
        RecipeError: Another normalisation than that of the data.
    """
    assert isinstance(module, External)
    weights = zoo.published(name, module.network)
    check_normalisation(f"{table} {name}", {"mean": weights.mean, "std": weights.std}, facts)
    module.network.load_state_dict({**module.network.state_dict(), **weights.state})
    return weights.complete


def check_normalisation(what: str, expected: Mapping[str, Sequence[float] | None], facts: RunFacts) -> None:
    """Refuse weights that expect images of another normalisation than the data's.

    Args:
        what: The network, for the message.
        expected: mean and std, None where they are not known.
        facts: Normalisation of the data.

    Raises:
        RecipeError: They do.
    """
    for key, value in expected.items():
        # To three decimals, which is what most who publish weights write down.
        if value is not None and max(abs(a - b) for a, b in zip(value, getattr(facts, key), strict=True)) > 1e-3:
            raise RecipeError(
                f"{what} expects images normalised with {key} {list(value)}; the data use {list(getattr(facts, key))}. "
                f"Use the {what.split()[0]}'s: --set 'data.{key}={list(value)}'; published weights bring theirs where "
                "[data] has neither mean, std nor normalisation."
            )

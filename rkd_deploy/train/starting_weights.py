"""Loads the weights that T and S0 start from; refuses those that make no sense on the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from rkd_deploy.errors import CheckpointError, DataError, RecipeError
from rkd_deploy.models import zoo
from rkd_deploy.models.external import External
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.checkpoints import load_checkpoint, read_labels, reorder_classes, weights_path
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.log import EpochRow
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
        _match_classes(module, checkpoint, names, facts)
        note(f"{checkpoint} has the classes in another order than the data: its classifier was put into theirs.")
    stated = {key: getattr(recipe.teacher, key) if table == "teacher" else None for key in ("mean", "std")}
    known = {key: getattr(read.facts, key) or stated[key] for key in ("mean", "std")}
    check_normalisation(f"{table} {settings.name}", known, facts)
    return all(value is not None for value in known.values())


def _match_classes(module: nn.Module, checkpoint: str, names: Sequence[str], facts: RunFacts) -> None:
    """Put a classifier whose classes have these names into the order of the data."""
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


_FEW = 20  # held-out images: of fewer, a good network too may get hardly any right


def near_chance(top1: float, classes: int) -> bool:
    """Whether an accuracy is hardly better than guessing.

    That is below three times chance; where classes are few and chance is high, below a fifth of the way from chance to
    100 %.

    Args:
        top1: In %.
        classes: K; chance is 100 / K %.
    """
    chance = 100 / classes
    return top1 < min(3 * chance, chance + (100 - chance) / 5)


def refuse_guessing(what: str, top1: float, images: int, facts: RunFacts, known: bool) -> None:
    """Refuse a loaded network that guesses on the data: it is fed wrongly, and hours of imitating it would be lost.

    Args:
        what: Which network, from where, for the message.
        top1: Accuracy of the network in %.
        images: How many images that was measured on.
        facts: Classes and normalisation of the data.
        known: Whether the normalisation it expects is known.

    Raises:
        DataError: The accuracy is near chance.
    """
    if not near_chance(top1, len(facts.classes)):
        return
    normalisation = "" if known else f"; its normalisation is not recorded, the data's is mean {list(facts.mean)}"
    raise DataError(
        f"{what} classifies {top1:.1f} % of {images} training images right, chance is "
        f"{100 / len(facts.classes):.1f} %: it was trained on other classes, another order of them, or another "
        f"normalisation{normalisation}. State the right ones in [data] (mean, std, name), or the order of the "
        "checkpoint's classes: timm sorts folder 2 before 10, and a file with its class names, one a line, is "
        "teacher.labels or student.labels."
    )


def teacher_warning(row: EpochRow, images: int, classes: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The warning of log and terminal about a teacher that was trained here and guesses; empty where it does not.

    Args:
        row: The teacher's last epoch, a line of the log.
        images: How many are held out; with a few or none, nothing can be said.
        classes: Names of the classes.
        recipe: What the teacher was trained by.
    """
    top1 = row.val_top1_ema if recipe.train.ship == "ema" else row.val_top1
    if top1 is None or images < _FEW or not near_chance(top1, len(classes)):
        return {}
    chance = 100 / len(classes)
    text = (
        f"The teacher classifies {top1:.1f} % of {images:,} held-out images right, and chance is {chance:.1f} %: what "
        "S and A imitate is no better than noise. Train it for longer or at another rate (--set "
        f"teacher.epochs={2 * row.epoch}, teacher.lr), or give one that is trained (--set teacher.checkpoint=FILE)."
    )
    return {"phase": row.phase, "text": text, "val_top1": top1, "chance": chance}

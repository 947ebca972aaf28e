"""Networks that do no better than chance: nothing can be learnt from them, nor compared with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rkd_deploy.errors import DataError
from rkd_deploy.recipe import Recipe

_FEW = 20  # held-out images: of fewer, a good network too may get hardly any right


def near_chance(top1: float, classes: int) -> bool:
    """Whether an accuracy is hardly better than guessing.

    Below three times chance; where classes are few and chance is high, below a fifth of the way from there to 100 %.

    Args:
        top1: In %.
        classes: K; chance is 100 / K %.
    """
    chance = 100 / classes
    return top1 < min(3 * chance, chance + (100 - chance) / 5)


def refuse_guessing(what: str, top1: float, images: int, facts: Mapping[str, Any], known: bool) -> None:
    """A network that guesses on its own data is fed wrongly: say so now, not after hours of imitating it.

    Args:
        what: Which network, from where, for the message.
        top1: Its accuracy in %.
        images: On how many.
        facts: Classes and normalisation of the data.
        known: Whether the normalisation it expects is known.

    Raises:
        DataError: It guesses.
    """
    if not near_chance(top1, len(facts["classes"])):
        return
    normalisation = "" if known else f"; its normalisation is not recorded, the data's is mean {facts['mean']}"
    raise DataError(
        f"{what} classifies {top1:.1f} % of {images} training images right, chance is "
        f"{100 / len(facts['classes']):.1f} %: it was trained on other classes, another order of them, or another "
        f"normalisation{normalisation}. State the right ones in [data]: mean, std, name."
    )


def teacher_warning(row: Mapping[str, Any], images: int, classes: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """What the log and the terminal say of a teacher that was trained here and guesses; nothing where it does not.

    Args:
        row: Of the log, its last epoch.
        images: How many are held out; with a few or none, nothing can be said.
        classes: Their names.
        recipe: What it was trained by.
    """
    top1 = row["val_top1_ema" if recipe.train.ship == "ema" else "val_top1"]
    if top1 is None or images < _FEW or not near_chance(top1, len(classes)):
        return {}
    chance = 100 / len(classes)
    text = (
        f"The teacher classifies {top1:.1f} % of {images:,} held-out images right, and chance is {chance:.1f} %: what "
        "S and A imitate is no better than noise. Train it for longer or at another rate (--set "
        f"teacher.epochs={2 * row['epoch']}, teacher.lr), or give one that is trained (--set teacher.checkpoint=FILE)."
    )
    return {"phase": row["phase"], "text": text, "val_top1": top1, "chance": chance}

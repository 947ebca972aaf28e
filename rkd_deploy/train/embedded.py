"""Chooses the recipe that lies in the package: digits, or photos where the images are files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rkd_deploy.recipe import Recipe, named_by_folder, override_values, read_recipe
from rkd_deploy.recipe.data import FILES

_DIGITS, _PHOTOS = (Path(__file__).with_name(name) for name in ("digits.toml", "photos.toml"))
_NARROWED = ("student.name=teacher", "student.fraction=0.5")
"""S0 where nobody names it."""
_SCRATCH = {"epochs": 120, "lr": 0.1}
"""Length and rate from random weights, those of benchmarks/photos.py for 800 photos; many more need fewer epochs."""
_TRAINED = {"epochs": 30, "lr": 0.02}
"""Length and rate from trained weights. Fine-tuning takes a tenth of the rate from scratch (0.01); a network that has
lost half of its channels has more to learn anew."""
_SIDE, _PUBLISHED_SIDE = 128, 224
"""Pixels where all begins at random: a third of the arithmetic of those that published weights were trained with."""


def embedded_recipe(overrides: Iterable[str] = ()) -> Recipe:
    """The recipe inside the package: digits, without a download, or photos where the overrides name image files.

    Args:
        overrides: `table.key=value` each, as `read_recipe` takes them. They go before all that the package says.

    Raises:
        RecipeError: As `read_recipe` raises it.
    """
    overrides = list(overrides)
    values = override_values(overrides)
    if values.get("data", {}).get("name") not in FILES:
        recipe = read_recipe(_DIGITS, overrides)
    else:
        if values.get("student", {}).get("name", "teacher") == "teacher":
            overrides = [*_NARROWED, *overrides]
        by_weights = _by_weights(read_recipe(_PHOTOS, overrides), follows=set(values.get("train", {})))
        recipe = read_recipe(_PHOTOS, [*by_weights, *overrides])
    return recipe if "name" in values else named_by_folder(recipe)


def _by_weights(recipe: Recipe, follows: set[str]) -> list[str]:
    """Overrides for what depends on where weights come from.

    Args:
        recipe: Names the networks and their weights.
        follows: Keys of [train] that are set by hand; T, which has keys of its own for them, goes by these too.
    """
    teacher, student = recipe.teacher, recipe.student
    given = [table for table in (teacher, student) if table.pretrained or table.checkpoint]
    inherits = student.inherits and recipe.method.scheme != "progressive"  # which begins at random whatever it is given
    lines = [f"data.image_size={_PUBLISHED_SIDE if given else _SIDE}"]
    lines += [f"train.{key}={value}" for key, value in (_TRAINED if inherits else _SCRATCH).items()]
    if teacher.checkpoint is None:
        of_teacher = _TRAINED if teacher.pretrained else _SCRATCH
        lines += [f"teacher.{key}={value}" for key, value in of_teacher.items() if key not in follows]
    return lines

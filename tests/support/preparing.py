"""The facts of a recipe without a run."""

from __future__ import annotations

from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import preparation
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.networks import build_originals


def facts_of(recipe: Recipe, images: ImageSet | None = None) -> RunFacts:
    """As `fit` gathers them."""
    images = images or load_images(recipe.data, recipe.train.seed)
    originals = build_originals(recipe, len(images.classes), images.image_size)
    return preparation.gather_facts(recipe, images, originals)

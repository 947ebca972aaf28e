"""Facts of a recipe without a run, and runs whose files a test has changed."""

from __future__ import annotations

import json
from pathlib import Path

from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import preparation
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.networks import build_originals
from rkd_deploy.train.runs import Run


def facts_of(recipe: Recipe, images: ImageSet | None = None) -> RunFacts:
    """As `fit` gathers them."""
    images = images or load_images(recipe.data, recipe.train.seed)
    originals = build_originals(recipe, len(images.classes), images.image_size)
    return preparation.gather_facts(recipe, images, originals)


def reseal(folder: Path) -> None:
    """Record the files of a run as they are now: so that what comes behind the checksums is reached."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["files"] = Run(folder).sealed_files()
    (folder / "metrics.json").write_text(json.dumps(metrics))

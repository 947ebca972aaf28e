"""`fit_series`: trains one recipe with several seeds, and sums the runs up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from rkd_deploy.errors import InterruptedTraining, UsageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.storage import write_json
from rkd_deploy.train.distributed import process_group
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.loop import Display
from rkd_deploy.train.runs import DEFAULT_ROOT, Run, Series, runs_of


def fit_series(
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    root: Path = DEFAULT_ROOT,
    display: Display | None = None,
    resumed: bool = False,
) -> Series:
    """Train a recipe once with each seed; train.seed is replaced.

    Args:
        recipe: What to train (`rkd_deploy.recipe`).
        seeds: Two or more, each once.
        root: Folder of runs.
        display: Shows each run in turn.
        resumed: Go on with a series that was interrupted: runs of this recipe and these seeds that are finished are
            taken as they are, unfinished ones are resumed.

    Raises:
        UsageError: Fewer than two seeds, or one of them twice.
        RkdError: As `fit`.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)}: a standard deviation needs two or more, each once, e.g. --seeds 0,1,2.")
    recipes = [dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed)) for seed in seeds]
    with process_group() as group:
        runs = []
        for seeded in recipes:
            begun = group.on_main(partial(runs_of, root, seeded)) if resumed else []
            try:
                runs.append(resume(begun[-1], display=display) if begun else fit(seeded, root=root, display=display))
            except InterruptedTraining as error:
                raise InterruptedTraining(f"{error} (or the whole series: the same command with --resume)") from error
        return group.on_main(lambda: _summary(tuple(seeds), tuple(runs), root))


def _summary(seeds: tuple[int, ...], runs: tuple[Run, ...], root: Path) -> Series:
    parts = {}
    for part, first in runs[0].metrics.parts.items():
        accuracies = [run.metrics.parts[part].test_top1 for run in runs]
        parts[part] = {
            "test_top1": accuracies,
            "mean": mean(accuracies),
            "std": stdev(accuracies),
            "test_images": first.test_images,
            "macs": first.macs,
            "parameters": first.parameters,
        }
    series = Series(seeds, runs, parts, root / f"series-{runs[0].folder.name}.json")
    write_json(series.path, series.to_dict())
    return series

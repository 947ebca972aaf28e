"""The same recipe with several seeds: one run each, then mean and standard deviation of every network's accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rkd_deploy.errors import InterruptedTraining, UsageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.storage import write_json
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.loop import Display
from rkd_deploy.train.parallel import joined
from rkd_deploy.train.runs import DEFAULT_ROOT, Run, runs_of


@dataclass(frozen=True)
class Series:
    """Finished runs that differ in their seed only.

    Attributes:
        seeds: In the order of the runs.
        runs: One for each seed.
        parts: For every network: `test_top1` of each run, their `mean` and sample standard deviation `std` in percent,
            its `macs` and `parameters`.
        path: The JSON file that says the same.
    """

    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    parts: dict[str, dict[str, Any]]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"seeds": list(self.seeds), "runs": [str(run.folder) for run in self.runs], "parts": self.parts}


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
        recipe: See `rkd_deploy.recipe`.
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
    with joined() as group:
        runs = []
        for one in recipes:
            found = group.first(lambda one=one: runs_of(root, one)) if resumed else []  # type: ignore[misc]
            try:
                runs.append(resume(found[-1], display=display) if found else fit(one, root=root, display=display))
            except InterruptedTraining as error:
                raise InterruptedTraining(f"{error} (or the whole series: the same command with --resume)") from error
        return group.first(lambda: _summed_up(tuple(seeds), tuple(runs), root))


def _summed_up(seeds: tuple[int, ...], runs: tuple[Run, ...], root: Path) -> Series:
    metrics = [run.read_json("metrics.json")["parts"] for run in runs]
    parts = {}
    for part, facts in metrics[0].items():
        accuracies = [one[part]["test_top1"] for one in metrics]
        own = {"test_top1": accuracies, "mean": mean(accuracies), "std": stdev(accuracies)}
        parts[part] = own | {key: facts[key] for key in ("test_images", "macs", "parameters")}
    series = Series(seeds, runs, parts, root / f"series-{runs[0].folder.name}.json")
    write_json(series.path, series.to_dict())
    return series

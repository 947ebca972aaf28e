from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rkd_deploy.compare import compare_runs
from rkd_deploy.errors import InterruptedTraining, UsageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.display import Silent, print_series
from rkd_deploy.train.fitting import fit
from rkd_deploy.train.series import fit_series

MakeRecipe = Callable[..., Recipe]
QUICK = ("data.train_limit=40", "data.test_limit=20", "train.epochs=1", "method.name=cross_entropy")


class StopsInRun(Silent):
    """Ctrl-C in the first step of a run."""

    def __init__(self, number: int) -> None:
        self.left = number

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.left -= name != "test"
        if self.left == 0:
            raise InterruptedTraining("Stopped.")


def test_seeds_make_one_run_each_and_one_summary(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    series = fit_series(tiny_recipe(*QUICK), (3, 5, 8), root=tmp_path)
    assert [run.recipe.train.seed for run in series.runs] == [3, 5, 8]
    accuracies = [run.read_json("metrics.json")["parts"]["s0"]["test_top1"] for run in series.runs]
    part = series.parts["s0"]
    assert part["test_top1"] == accuracies
    assert part["mean"] == pytest.approx(np.mean(accuracies))
    assert part["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert json.loads(series.path.read_text()) == series.to_dict()
    assert len({run.metrics.test_sha256 for run in series.runs}) == 1  # every seed is judged on the same images
    other = fit(tiny_recipe(*QUICK, "data.split_seed=1"), root=tmp_path / "other")
    assert other.metrics.test_sha256 not in ("", series.runs[0].metrics.test_sha256)
    with pytest.raises(UsageError, match=r"different images: images and labels, SHA-256 .*data\.split_seed"):
        compare_runs([series.runs[0], other])
    assert series.path == tmp_path / "series-tiny-001.json"


def test_an_interrupted_series_repeats_no_finished_seed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(*QUICK)
    whole = fit_series(recipe, (1, 2, 3), root=tmp_path / "whole")
    with pytest.raises(InterruptedTraining, match=r"\(or the whole series: the same command with --resume\)"):
        fit_series(recipe, (1, 2, 3), root=tmp_path / "cut", display=StopsInRun(2))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/tiny-001").rglob("*") if path.is_file()}
    series = fit_series(recipe, (1, 2, 3), root=tmp_path / "cut", resumed=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [run.folder.name for run in series.runs] == ["tiny-001", "tiny-002", "tiny-003"]
    assert series.parts == whole.parts


@pytest.mark.parametrize("seeds", [(), (1,), (1, 2, 1)])
def test_seeds_that_give_no_deviation_are_refused(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=re.escape(f"seeds {list(seeds)}: a standard deviation needs two or more")):
        fit_series(Recipe(), seeds, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_mean_and_deviation(
    tmp_path: Path, tiny_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    series = fit_series(tiny_recipe(*QUICK), (0, 1), root=tmp_path)
    print_series(series, Console(width=100))
    part = series.parts["s0"]
    cells = [f"{value:.2f}" for value in (part["mean"], part["std"], *part["test_top1"])]
    assert re.search(r"S0\D+" + r"\D+".join(map(re.escape, cells)), capsys.readouterr().out)

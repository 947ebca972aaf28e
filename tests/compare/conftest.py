from __future__ import annotations

import shutil

import pytest
from sharing import made_once

from rkd_deploy.train.fitting import fit
from rkd_deploy.train.runs import Run, open_run

RUNS = {
    "seed0": (),
    "seed1": ("train.seed=1",),
    "at": ("method.base=at",),
    "kd": ("method.name=kd",),
    "lone": ("student.baseline=false",),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_recipe):
    """Finished runs by name: residual with two seeds and with AT, KD alone, and one without its control."""

    def train(root):
        for name, overrides in RUNS.items():
            fit(tiny_recipe(f"name={name}", "train.epochs=1", "student.control=true", *overrides), root=root)

    root = made_once(tmp_path_factory, "compared", train)
    return {name: open_run(next(root.glob(f"{name}-*"))) for name in RUNS}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a run that a test may change."""
    return lambda name: Run(shutil.copytree(finished[name].folder, tmp_path / name))

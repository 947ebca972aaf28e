from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rkd_deploy.data.sources import load_images
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.train import fitting, preparation
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors

separate_once, load_once = functools.cache(separate), functools.cache(load_images)


@pytest.fixture(autouse=True, scope="module")
def what_is_the_same_each_time_is_remembered() -> Iterator[None]:
    """The tests here train the same few recipes over and over: widths are searched for and images read only once.

    Of a separation only the widths are used in training; that search and that reading have tests of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "separate", separate_once)
        patch.setattr(fitting, "load_images", load_once)
        yield


@pytest.fixture
def pth(tmp_path: Path, tiny_run: Run) -> Path:
    """The teacher of the shared run as a foreign file: nothing is recorded in it."""
    torch.save(load_tensors(tiny_run.weights("teacher"))[0], tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"

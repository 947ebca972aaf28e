"""The log of a run and the checkpoint of a phase, damaged in every way: one error each."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rkd_deploy.errors import CheckpointError, InterruptedTraining, ModelFileError
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.curves import draw_curves
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import EpochRow, RunLog, read_epochs, read_log
from rkd_deploy.train.runs import Run, newest_run, runs_of
from rkd_deploy.train.weights import load_tensors, save_tensors
from tests.test_photos import StopAfter

ROW = {
    "event": "epoch",
    "loss": 2.0,
    "ce": 2.0,
    "train_top1": 50.0,
    "phase": "s0",
    "epoch": 1,
    "lr": 0.1,
    "val_top1": 25.0,
    "seconds": 2.0,
    "images_per_s": 100.0,
}


def line(**changes: Any) -> str:
    return json.dumps({**ROW, **changes}) + "\n"


def without(key: str) -> str:
    return json.dumps({name: value for name, value in ROW.items() if name != key}) + "\n"


def test_a_row_is_typed_and_comes_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.append(**ROW)
    (row,) = read_epochs(log.path)
    assert (row.phase, row.epoch, row.values) == ("s0", 1, {"loss": 2.0, "ce": 2.0})
    assert EpochRow.from_json(row.to_json()) == row
    assert {"event": "epoch", **row.to_json()} == ROW


DAMAGED: dict[str, tuple[str, str]] = {
    "a list": ("[]\n", r"\[\] where an object"),
    "null": ("null\n", "null where an object"),
    "no JSON": ("{\n", "no JSON"),
    "100,000 deep": ("[" * 100_000 + "\n", "nested too deeply"),
    "a number of 5,000 digits": (line()[:-2] + ', "x": ' + "1" * 5000 + "}\n", "a whole number of 5,000 digits"),
    "NaN": (line(loss=math.nan), "NaN is no number in JSON"),
    "infinity": ('{"event": "epoch", "loss": 1e999}\n', "1e999"),
    "an epoch that is a text": (line(epoch="1"), r"epoch 1 in it: epoch is \"1\" where a whole number"),
    "an epoch of minus one": (line(epoch=-1), "epoch -1 of 2.0 seconds cannot be"),
    "endless seconds": (line(seconds=1e308), "cannot be"),
    "more than all": (line(val_top1=101.0), "val_top1 is 101.0 where a percentage"),
    "a loss that is null": (line(loss=None), r"values\.loss is null where a number"),
    "a loss that is a list": (line(ce=[1]), r"values\.ce is \[1\] where a number"),
    "no phase": (without("phase"), "phase is missing"),
    "no seconds": (without("seconds"), "seconds is missing"),
    "values that change": (line() + line(epoch=2, val_top1=None), "epoch 2 in it has other values than the first of"),
    "a part that is gone": (line() + without("ce"), "epoch 2 in it has other values"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_log_is_one_error(tmp_path: Path, damage: str) -> None:
    text, words = DAMAGED[damage]
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ModelFileError, match=rf"log\.jsonl, the log of a run, cannot be read: .*{words}"):
        read_epochs(tmp_path / "log.jsonl")
    with pytest.raises(ModelFileError):
        draw_curves(Run(tmp_path), Recipe())


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n")
    for read in (read_log, lambda path: RunLog(path).forget("s0")):
        with pytest.raises(ModelFileError, match="it is not UTF-8 text"):
            read(tmp_path / "log.jsonl")


def test_a_pipe_holds_up_no_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match=r"Could not write .*log\.jsonl: No such device"):
        RunLog(tmp_path / "log.jsonl").append(**ROW)


def test_recipes_of_others_are_no_runs_of_this_one(tmp_path: Path) -> None:
    for name in ("pipe", "bytes", "same"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "recipe.toml")
    (tmp_path / "bytes" / "recipe.toml").write_bytes(b"\xff")
    (tmp_path / "same" / "recipe.toml").write_text(Recipe().to_toml())
    assert [run.folder.name for run in runs_of(tmp_path, Recipe())] == ["same"]


def test_signs_of_a_formula_in_a_runs_name_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = Run(tmp_path / "a$}$[b]\n\x1b[31m")
    run.folder.mkdir()
    run.log.append(**ROW)
    draw_curves(run, Recipe())
    assert (run.folder / "curves.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., Recipe]) -> Run:
    """A run that was stopped within an epoch of its first phase."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedTraining):
        fit(tiny_recipe(), root=root, display=StopAfter(2))
    return newest_run(root, finished=False)


def tensors_without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(name)}


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "phase is missing"),
    "an epoch that is a text": ({"epoch": "0"}, 'epoch is "0" where a whole number'),
    "an epoch of minus one": ({"epoch": -1}, "negative"),
    "names that are a number": ({"names": 5}, "names is 5 where a list"),
    "a log that is null": ({"log": None}, "log is null where a whole number"),
}
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "no random state": tensors_without("random"),
    "no weights": tensors_without("product/"),
    "a random state of another length": lambda tensors: tensors | {"random": torch.zeros(3, dtype=torch.uint8)},
    "a momentum of no parameter": lambda tensors: tensors | {"momentum/99999": torch.zeros(1)},
    "a momentum of no number": lambda tensors: tensors | {"momentum/x": torch.zeros(1)},
    "a momentum of another shape": lambda tensors: tensors | {"momentum/0": torch.zeros(7, 7)},
}


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return Run(folder)


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header_of_a_checkpoint_is_one_error(stopped: Run, tmp_path: Path, damage: str) -> None:
    changes, words = HEADERS[damage]
    run = copy_of(stopped, tmp_path / "run")
    tensors, facts = load_tensors(run.checkpoint)
    save_tensors(run.checkpoint, tensors, facts | changes if changes else {})
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.safetensors, the state .* is damaged: .*{words}.*Remove it"
    ):
        resume(run)


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_of_another_phase_are_one_error(stopped: Run, tmp_path: Path, damage: str) -> None:
    run = copy_of(stopped, tmp_path / "run")
    tensors, facts = load_tensors(run.checkpoint)
    save_tensors(run.checkpoint, TENSORS[damage](tensors), facts)
    with pytest.raises(CheckpointError, match="is damaged: it does not fit phase teacher"):
        resume(run)


@pytest.mark.parametrize("damage", ["cut off", "a pipe", "empty"])
def test_a_checkpoint_that_is_no_file_is_one_error_and_the_way_out_works(
    stopped: Run, tmp_path: Path, damage: str
) -> None:
    run = copy_of(stopped, tmp_path / "run")
    content = run.checkpoint.read_bytes()
    run.checkpoint.unlink()
    if damage == "a pipe":
        os.mkfifo(run.checkpoint)
    else:
        run.checkpoint.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"")
    with pytest.raises(CheckpointError, match=r"is damaged: .*Remove it, and that phase begins anew with: rkd-deploy"):
        resume(run)
    if damage == "empty":
        run.checkpoint.unlink()
        assert resume(run).finished

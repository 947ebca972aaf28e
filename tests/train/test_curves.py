from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rkd_deploy.errors import StorageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.curves import draw_curves, draw_phases
from rkd_deploy.train.display import Silent, TensorBoard, with_tensorboard
from rkd_deploy.train.fitting import fit
from rkd_deploy.train.log import read_log
from rkd_deploy.train.runs import Run, create_run


def row(phase: str, epoch: int, **more: Any) -> dict[str, Any]:
    values = {
        "loss": 2.0 / epoch,
        "ce": 2.0 / epoch,
        "train_top1": 10.0 * epoch,
        "val_top1": [20.0, 40.0, 30.0][epoch - 1],
    }
    return {"event": "epoch", "phase": phase, "epoch": epoch, "lr": 0.1, "seconds": 1.0, **values, **more}


def test_the_picture_shows_every_value_of_every_phase() -> None:
    rows = [row("teacher", epoch) for epoch in (1, 2, 3)] + [row("student", epoch, student=0.5) for epoch in (1, 2)]
    figure = draw_phases(rows, "tiny-001")
    axes = figure.get_axes()
    assert [panel.get_title(loc="left") for panel in axes[:2]] == ["teacher", "student"]
    lines = {(index, line.get_label()): line for index, panel in enumerate(axes) for line in panel.get_lines()}
    assert list(lines[0, "ce"].get_ydata()) == [2.0, 1.0, 2.0 / 3]
    assert (0, "loss") not in lines  # it is ce
    assert list(lines[1, "student"].get_ydata()) == [0.5, 0.5]
    assert list(lines[2, "held out"].get_ydata()) == [20.0, 40.0, 30.0]
    assert list(lines[2, "best: 40.0 % (epoch 2)"].get_xdata()) == [2]
    assert list(lines[2, "last: 30.0 % (epoch 3)"].get_xdata()) == [3]
    assert axes[2].get_xlabel() == "epoch"
    assert (axes[0].get_ylabel(), axes[2].get_ylabel()) == ("loss and its parts", "top-1, %")


def test_a_phase_that_classifies_nothing_has_its_losses_only() -> None:
    rows = [{**row("stage_1_student", epoch), "val_top1": None} for epoch in (1, 2)]
    for epoch_row in rows:
        del epoch_row["train_top1"]
    losses, accuracies = draw_phases(rows, "tiny-001").get_axes()
    assert [line.get_label() for line in losses.get_lines()] == ["ce"]
    assert accuracies.get_lines() == []
    assert accuracies.get_legend() is None


def test_a_run_draws_itself_where_the_recipe_wants_it(tmp_path: Path, tiny_run: Run) -> None:
    assert not (tiny_run.folder / "curves.png").exists()  # its recipe does not
    run = create_run(tmp_path, tiny_run.recipe)
    run.log.path.write_bytes(tiny_run.log.path.read_bytes())
    wanted = dataclasses.replace(tiny_run.recipe, train=dataclasses.replace(tiny_run.recipe.train, curves=True))
    draw_curves(run, wanted)
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").get_flattened_data())) > 10  # not an empty canvas


def test_tensorboard_has_what_the_log_has(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    how = ("data.train_limit=40", "data.test_limit=20", "method.name=cross_entropy", "train.tensorboard=true")
    run = fit(tiny_recipe(*how, "train.epochs=3"), root=tmp_path)
    events = EventAccumulator(str(run.folder / "tensorboard" / "s0"))
    events.Reload()
    rows = read_log(run.log.path)
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"event", "phase", "epoch"}
    for key in ("ce", "train_top1", "val_top1", "lr"):
        scalars = [(event.step, event.value) for event in events.Scalars(key)]
        assert scalars == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows]


def test_epochs_that_a_resumed_run_writes_again_hide_the_old_ones(tmp_path: Path) -> None:
    run = create_run(tmp_path, Recipe(name="a"))
    for done, epochs in ((0, (1, 2, 3)), (10, (2, 3))):
        board = TensorBoard(Silent(), run)
        board.phase("s0", 3, 10, done)
        for epoch in epochs:
            board.epoch(row("s0", epoch, ce=done + epoch))
        board.close()
    events = EventAccumulator(str(run.folder / "tensorboard" / "s0"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("ce")] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_without_it_the_display_stays_what_it_is(tmp_path: Path, tiny_run: Run) -> None:
    silent = Silent()
    assert with_tensorboard(silent, tiny_run, tiny_run.recipe.train) is silent


def test_a_folder_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    run = create_run(tmp_path, Recipe(name="a"))
    (run.folder / "tensorboard").write_text("a file")
    board = TensorBoard(Silent(), run)
    board.phase("s0", 1, 1, 0)
    with pytest.raises(StorageError, match="Could not write"):
        board.epoch(row("s0", 1))

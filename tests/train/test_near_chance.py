"""A teacher that guesses: refused where it is given, warned of where it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_deploy.errors import DataError
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import fitting
from rkd_deploy.train.display import Silent
from rkd_deploy.train.evaluation import near_chance, refuse_guessing, teacher_warning
from rkd_deploy.train.facts import RunFacts, SplitSizes
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import EpochRow, read_log
from rkd_deploy.train.runs import Run, newest_run


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("classes", "guessed", "learnt"), [(2, 59, 61), (3, 46, 47), (10, 27, 29), (100, 2.9, 3.1), (1000, 0.29, 0.31)]
)
def test_near_chance_is_where_guessing_is(classes: int, guessed: float, learnt: float) -> None:
    assert near_chance(100 / classes, classes)
    assert near_chance(guessed, classes)
    assert not near_chance(learnt, classes)
    assert not near_chance(100, classes)


def test_a_given_network_of_two_classes_that_has_learnt_is_used() -> None:
    """Three times chance would be 150 %."""
    facts = RunFacts(
        data="pets",
        classes=("cat", "dog"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        image_size=(8, 8),
        images=SplitSizes(train=100, val=0, test=10),
        channels=64,
    )
    refuse_guessing("teacher t.pth", 90.0, 100, facts, known=True)
    with pytest.raises(DataError, match=r"^teacher t\.pth classifies 52\.0 % of 100 .* chance is 50\.0 %"):
        refuse_guessing("teacher t.pth", 52.0, 100, facts, known=True)


def test_a_teacher_that_learnt_nothing_is_warned_of(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    """At a rate of nothing it stays as it was drawn. The run goes on: someone may want to see just that."""
    display = Noting()
    how = ("data.train_limit=200", "data.val_fraction=0.5", "data.test_limit=20", "train.epochs=1", "teacher.lr=1e-9")
    run = fit(tiny_recipe(*how, "method.name=kd"), root=tmp_path, display=display)
    assert run.finished
    last = next(row for row in read_log(run.log.path) if row["phase"] == "teacher")
    (warning,) = read_log(run.log.path, "warning")
    assert warning["phase"] == "teacher"
    assert warning["val_top1"] == last["val_top1"] < 28
    assert warning["chance"] == 10
    (note,) = (note for note in display.notes if note.startswith("Warning: "))
    assert note == f"Warning: {warning['text']}"
    for words in (f"{last['val_top1']:.1f} % of 100 held-out images", "chance is 10.0 %", "teacher.epochs=2"):
        assert words in note
    order = [(row["event"], row["phase"]) for row in map(json.loads, run.log.path.read_text().splitlines())]
    assert order == [("epoch", "teacher"), ("warning", "teacher"), ("epoch", "s0")]


def test_after_a_kill_it_is_said_once(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the warning and the weights that end the phase."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    how = ("data.train_limit=60", "data.val_fraction=0.5", "data.test_limit=20", "train.epochs=1", "teacher.lr=1e-9")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_recipe(*how, "method.name=kd"), root=tmp_path)
    stopped = newest_run(tmp_path, finished=False)
    assert len(read_log(stopped.log.path, "warning")) == 1
    assert len(read_log(resume(stopped).log.path, "warning")) == 1


def test_two_held_out_images_prove_nothing(tiny_recipe: Callable[..., Recipe]) -> None:
    row = EpochRow(phase="teacher", epoch=3, lr=0.1, val_top1=0.0, seconds=1.0, images_per_s=1.0)
    assert teacher_warning(row, 2, "0123456789", tiny_recipe()) == {}
    assert "--set teacher.epochs=6" in teacher_warning(row, 50, "0123456789", tiny_recipe())["text"]


def test_a_teacher_that_learnt_is_not(tiny_run: Run) -> None:
    assert read_log(tiny_run.log.path, "warning") == []

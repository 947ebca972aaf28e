"""Weights that a recipe names: used as they are, refused, kept in the run's folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rkd_deploy.errors import BudgetError, CheckpointError, DataError, RecipeError, RkdError, UsageError
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import read_log
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors, save_tensors

MakeRecipe = Callable[..., Recipe]
QUICK = ("data.train_limit=40", "data.test_limit=20", "train.epochs=1")


def weights(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.folder / "weights").iterdir())}


def state_of(run: Run, phase: str) -> dict[str, torch.Tensor]:
    return load_tensors(run.weights(phase))[0]


def untimed(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)]


def no_run_was_begun(tmp_path: Path) -> bool:
    return not list(tmp_path.glob("**/recipe.toml"))


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_given_teacher_is_used_as_it_is(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_run: Run, pth: Path, kind: str
) -> None:
    path = pth if kind == "pth" else tiny_run.weights("teacher")
    run = fit(tiny_recipe(*QUICK, f"teacher.checkpoint={path}", f"student.checkpoint={path}"), root=tmp_path / "runs")
    teacher = state_of(tiny_run, "teacher")
    for phase in ("teacher", "s0"):
        used = state_of(run, phase)
        assert used.keys() == teacher.keys()
        assert all(torch.equal(value, teacher[key]) for key, value in used.items())
    assert [row["phase"] for row in read_log(run.log.path)] == ["student", "assistant"]
    parts = run.read_json("metrics.json")["parts"]
    assert parts["teacher"]["test_top1"] == parts["s0"]["test_top1"] > 50


@pytest.mark.parametrize("content", [None, "a pipe", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
@pytest.mark.parametrize("keys", [("method.name=kd",), ("method.name=cross_entropy",)])
def test_a_checkpoint_that_is_no_file_is_found_at_once(
    tmp_path: Path, tiny_recipe: MakeRecipe, keys: tuple[str, ...], content: str | None
) -> None:
    """Also where the method has no use for T: the key was written to be read."""
    path = tmp_path / "t.pth"
    if content == "a pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"t\.pth \(teacher\.checkpoint\)"):
        fit(tiny_recipe(*keys, f"teacher.checkpoint={path}"), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_home_folder_is_meant_by_a_tilde(
    tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(pth.parent))
    run = fit(tiny_recipe(*QUICK, "method.name=kd", f"teacher.checkpoint=~/{pth.name}"), root=tmp_path / "runs")
    assert run.facts.given["teacher"].file == pth.name
    assert run.recipe.teacher.checkpoint == str(run.weights("teacher"))


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, tiny_recipe: MakeRecipe, tiny_run: Run) -> None:
    classes = ["0", "1", "2", "three", "4", "5", "6", "7", "8", "9"]
    save_tensors(tmp_path / "t.safetensors", state_of(tiny_run, "teacher"), {"classes": classes})
    with pytest.raises(CheckpointError, match=r"other classes than the data: class 3 is 'three' there and '3' here"):
        fit(tiny_recipe(*QUICK, f"teacher.checkpoint={tmp_path / 't.safetensors'}"), root=tmp_path / "runs")
    assert no_run_was_begun(tmp_path)


@pytest.mark.parametrize("by", ["its header", "a file of labels"])
def test_classes_in_another_order_are_matched_by_name(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_run: Run, by: str
) -> None:
    """Natural order against that of text, as of folders 1, 2, .. 10: the teacher is as good as before."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    state = state_of(tiny_run, "teacher")
    moved = state | {key: state[key][order] for key in ("fc.weight", "fc.bias")}
    names = [str(label) for label in order]
    path = tmp_path / "t.safetensors"
    save_tensors(path, moved, {"classes": names} if by == "its header" else {})
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    labels = () if by == "its header" else (f"teacher.labels={tmp_path / 'labels.txt'}",)
    keys = (*QUICK, "method.name=kd", f"teacher.checkpoint={path}")
    run = fit(tiny_recipe(*keys, *labels), root=tmp_path / "runs")
    assert all(torch.equal(value, state[key]) for key, value in state_of(run, "teacher").items())
    assert run.metrics.parts["teacher"].test_top1 > 50
    if labels:
        with pytest.raises(DataError, match=r"another order of the.*teacher\.labels"):
            fit(tiny_recipe(*keys), root=tmp_path / "runs")
        (tmp_path / "labels.txt").write_text("\n".join([*names[:9], "x"]))
        with pytest.raises(CheckpointError, match="other classes than the data"):
            fit(tiny_recipe(*keys, *labels), root=tmp_path / "runs")
        (tmp_path / "labels.txt").write_text("\n".join(names[:9]))
        with pytest.raises(CheckpointError, match=r"is for 9 classes \(.*labels\.txt\); the data have 10"):
            fit(tiny_recipe(*keys, *labels), root=tmp_path / "runs")
        (tmp_path / "labels.txt").write_text("\n".join([*names, "3"]))
        with pytest.raises(CheckpointError, match="names class '3' twice"):
            fit(tiny_recipe(*keys, *labels), root=tmp_path / "runs")


def test_the_chosen_set_of_weights_is_said(tmp_path: Path, tiny_recipe: MakeRecipe, tiny_run: Run) -> None:
    state = state_of(tiny_run, "teacher")
    torch.save({"ema": state, "state_dict": {k: v * 0 for k, v in state.items()}}, tmp_path / "t.pth")
    keys = (*QUICK, "method.name=kd", f"teacher.checkpoint={tmp_path / 't.pth'}")
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    with pytest.raises(DataError, match="chance"):
        fit(tiny_recipe(*keys), root=tmp_path / "runs", display=Noting())
    assert any("state_dict was taken and not ema; teacher.checkpoint_key names another" in text for text in notes)
    notes.clear()
    run = fit(tiny_recipe(*keys, "teacher.checkpoint_key=ema"), root=tmp_path / "runs", display=Noting())
    assert not any("several sets" in text for text in notes)
    assert run.recipe.teacher.checkpoint_key is None  # of the run's own copy, which has one set


@pytest.mark.parametrize("batch", [("train.batch_size=4", "train.accumulate=4")])
def test_pieces_of_one_image_are_refused_where_there_is_batch_norm(
    tmp_path: Path, tiny_recipe: MakeRecipe, batch: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError, match=r"leaves one image in each, and batch norm needs two.*batch_size to 8"):
        fit(tiny_recipe(*QUICK, *batch), root=tmp_path / "runs")
    assert no_run_was_begun(tmp_path)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_teacher_of_another_normalisation_is_refused_with_the_right_one(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_run: Run, pth: Path, key: str
) -> None:
    """Whether the file says so or the recipe; what is advised is then accepted."""
    other = {"mean": [0.305] * 3, "std": [0.318] * 3} | {key: [0.31, 0.31, 0.3]}
    save_tensors(tmp_path / "t.safetensors", state_of(tiny_run, "teacher"), other)
    recorded = (f"teacher.checkpoint={tmp_path / 't.safetensors'}",)
    stated = (f"teacher.checkpoint={pth}", f"teacher.{key}=[0.31, 0.31, 0.3]")
    for how in (recorded, stated):
        with pytest.raises(RecipeError) as caught:
            fit(tiny_recipe(*QUICK, *how), root=tmp_path / "runs")
        assert f"expects images normalised with {key} [0.31, 0.31, 0.3]" in str(caught.value)
        advice = f"data.{key}=[0.31, 0.31, 0.3]"
        assert f"Use the teacher's: --set '{advice}'" in str(caught.value)
        assert no_run_was_begun(tmp_path)
    assert fit(tiny_recipe(*QUICK, *recorded, advice), root=tmp_path / "runs").finished


def test_the_same_normalisation_to_three_digits_is_the_same(tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path) -> None:
    how = (f"teacher.checkpoint={pth}", "teacher.mean=[0.3055, 0.305, 0.305]", "teacher.std=[0.318, 0.3175, 0.318]")
    assert fit(tiny_recipe(*QUICK, *how), root=tmp_path / "runs").finished


def test_a_teacher_that_guesses_is_refused(tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path) -> None:
    """An absurd normalisation, which neither the file nor the recipe states: only its accuracy gives it away."""
    absurd = ("data.mean=[5, 5, 5]", "data.std=[0.01, 0.01, 0.01]")
    with pytest.raises(DataError) as caught:
        fit(tiny_recipe(*QUICK, f"teacher.checkpoint={pth}", *absurd), root=tmp_path / "runs")
    message = str(caught.value)
    assert message.startswith(f"teacher {pth} classifies ")
    assert "chance is 10.0 %" in message
    assert "its normalisation is not recorded, the data's is mean [5.0, 5.0, 5.0]" in message
    assert no_run_was_begun(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("teacher.checkpoint=absent.pth",), CheckpointError, r"There is no checkpoint at absent\.pth"),
        (
            ("teacher.name=resnet14", "teacher.checkpoint=PTH"),
            CheckpointError,
            r"is not a checkpoint of teacher resnet14",
        ),
        (("teacher.name=resnet9",), UsageError, r"Unknown network 'resnet9'"),
        (("student.name=resnet9",), UsageError, r"Unknown network 'resnet9'"),
        (
            ("student.baseline=false", "student.checkpoint=PTH", "student.weights=fresh"),
            RecipeError,
            r"student\.checkpoint is set and ",
        ),
        (("student.assistant_share=0.01", "student.round_to=16"), BudgetError, r"The budget is too small"),
        (("train.device=tpu7",), RecipeError, r"train\.device = 'tpu7' is no PyTorch device"),
        (("train.device=cuda",), RecipeError, r"PyTorch sees no CUDA device here\. Write auto or cpu"),
        (("data.train_limit=5",), DataError, r"data\.train_limit = 5 must be between 10"),
    ],
)
def test_what_cannot_be_is_found_before_a_run_is_begun(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    pth: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    error: type[RkdError],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tiny_recipe(*QUICK, *(override.replace("PTH", str(pth)) for override in overrides))
    with pytest.raises(error, match=message):
        fit(recipe, root=tmp_path / "runs")
    assert no_run_was_begun(tmp_path)


# From the folder alone


def test_a_run_goes_on_when_the_file_of_its_teacher_is_gone(tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path) -> None:
    recipe = tiny_recipe(*QUICK, f"teacher.checkpoint={pth}", "student.baseline=false")
    whole = fit(recipe, root=tmp_path / "runs")
    begun = tmp_path / "begun" / "tiny-001"
    shutil.copytree(whole.folder, begun)
    for name in ("metrics.json", "weights/assistant.safetensors"):
        (begun / name).unlink()
    pth.unlink()
    assert weights(resume(Run(begun))) == weights(whole)


def test_a_copied_folder_makes_the_same_run_again(tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path) -> None:
    """Its recipe.toml alone, elsewhere, after every file that it once named is gone."""
    how = (f"teacher.checkpoint={pth}", f"student.checkpoint={pth}")
    original = fit(tiny_recipe(*QUICK, *how), root=tmp_path / "original")
    before, logged = weights(original), untimed(original)
    named = original.read_json("facts.json")["given"]
    digest = hashlib.sha256(pth.read_bytes()).hexdigest()
    assert named == {name: {"file": "teacher.pth", "sha256": digest} for name in ("teacher", "s0")}
    shutil.move(original.folder, tmp_path / "moved")
    pth.unlink()
    again = fit(read_recipe(tmp_path / "moved" / "recipe.toml"), root=tmp_path / "again")
    assert weights(again) == before
    assert untimed(again) == logged
    assert again.read_json("metrics.json")["parts"].keys() == {"teacher", "s0", "student", "fused"}

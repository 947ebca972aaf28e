"""A run from recipe to folder: what it leaves, never looks at, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.data import splits
from rkd_deploy.data.sources import ImageSet, Split, load_images
from rkd_deploy.errors import CheckpointError, DivergenceError, StorageError, UsageError
from rkd_deploy.models.cost import count
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import evaluation, fitting
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import read_log
from rkd_deploy.train.networks import PARTS, load_part, seeded
from rkd_deploy.train.runs import Run, newest_run
from rkd_deploy.train.weights import load_tensors

MakeRecipe = Callable[..., Recipe]
QUICK = ("data.train_limit=40", "data.test_limit=20", "train.epochs=1")


def weights(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.folder / "weights").iterdir())}


def rows(run: Run) -> list[dict[str, Any]]:
    timeless = [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)
    ]
    assert timeless
    return timeless


# What a run leaves


def test_a_run_folder_holds_everything_and_nothing_else(tiny_run: Run) -> None:
    files = {str(path.relative_to(tiny_run.folder)) for path in tiny_run.folder.rglob("*") if path.is_file()}
    assert files == {"recipe.toml", "environment.json", "facts.json", "log.jsonl", "metrics.json"} | {
        f"weights/{name}.safetensors" for name in ("teacher", "s0", "student", "assistant")
    }
    assert tiny_run.finished


def test_every_phase_is_logged_epoch_by_epoch(tiny_run: Run) -> None:
    logged = [(row["phase"], row["epoch"]) for row in rows(tiny_run)]
    epochs = {"teacher": 4, "s0": 2, "student": 2, "assistant": 2}
    assert logged == [(phase, epoch + 1) for phase, number in epochs.items() for epoch in range(number)]


def test_networks_learn(tiny_run: Run) -> None:
    """Chance is 10 %; more than that cannot be asked of two epochs."""
    parts = tiny_run.read_json("metrics.json")["parts"]
    assert parts["teacher"]["test_top1"] > 50
    assert parts["s0"]["test_top1"] > 30
    explained = [row["explained"] for row in rows(tiny_run) if row["phase"] in ("student", "assistant")]
    assert explained[1] > explained[0]  # S comes nearer to T ...
    assert explained[3] > explained[1]  # ... and with A nearer still


def test_accuracies_are_those_of_the_weights_on_the_test_images(tiny_run: Run) -> None:
    """Again, image by image, from the files."""
    images = load_images(tiny_run.recipe.data, tiny_run.recipe.train.seed)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    parts = tiny_run.read_json("metrics.json")["parts"]
    assert list(parts) == [part for part in PARTS if part != "control"]
    for name, part in parts.items():
        module = load_part(tiny_run, name)
        assert not module.training
        with torch.no_grad():
            right = sum(
                module(((image / 255 - mean) / std)[None]).argmax().item() == label
                for image, label in zip(images.test.images_NCHW, images.test.labels_N.tolist(), strict=True)
            )
        assert part["test_images"] == len(images.test) == 100
        assert part["test_top1"] == pytest.approx(100 * right / 100)


def test_costs_are_those_of_the_networks_and_keep_the_budget(tiny_run: Run) -> None:
    parts, facts = tiny_run.read_json("metrics.json")["parts"], tiny_run.read_json("facts.json")
    for name, part in parts.items():
        cost = count(load_part(tiny_run, name), 8)
        assert (part["macs"], part["parameters"], part["unsupported_operators"]) == (cost.macs, cost.parameters, [])
    assert parts["student"]["macs"] < parts["fused"]["macs"] == facts["separation"]["cost"]
    assert parts["fused"]["macs"] <= parts["s0"]["macs"] == facts["separation"]["budget"]


def test_the_best_and_the_last_epoch_are_those_of_the_log(tiny_run: Run) -> None:
    phases = tiny_run.read_json("metrics.json")["phases"]
    for name, phase in phases.items():
        accuracies = [row["val_top1"] for row in rows(tiny_run) if row["phase"] == name]
        assert phase["epochs"] == len(accuracies)
        assert phase["val_top1_last"] == accuracies[-1]
        assert phase["val_top1_best"] == max(accuracies)
        assert phase["best_epoch"] == 1 + accuracies.index(max(accuracies))


def state_of(run: Run, phase: str) -> dict[str, Tensor]:
    return load_tensors(run.weights(phase))[0]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}


def test_each_phase_changed_its_own_part_only(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """Between the files: weights and batch-norm statistics of everything else are the same bits."""
    run = fit(tiny_recipe(*QUICK, "method.head=trained"), root=tmp_path)
    student, assistant, head = (state_of(run, phase) for phase in ("student", "assistant", "head"))
    assert changed(student, assistant) == {"assistants", "assistant_adapters"}
    assert changed(assistant, head) == {"head"}
    teacher = state_of(run, "teacher")
    assert torch.equal(student["head.weight"], teacher["fc.weight"])
    assert not torch.equal(head["head.weight"], teacher["fc.weight"])
    assert not student["assistant_adapters.0.norm.weight"].any()  # until A learns it adds nothing
    assert [row["phase"] for row in rows(run)] == ["teacher", "s0", "student", "assistant", "head"]
    assert type(load_part(run, "fused").get_submodule("head")) is nn.Linear


def test_a_trained_head_begins_fresh(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """At a rate of nothing the head stays as it began: drawn by seed, not the teacher's."""
    run = fit(tiny_recipe(*QUICK, "method.head=trained", "train.lr=1e-9", "student.baseline=false"), root=tmp_path)
    with seeded(run.recipe.train.seed, "init/head"):
        fresh = nn.Linear(64, 10)
    head = state_of(run, "head")
    torch.testing.assert_close(head["head.weight"], fresh.weight.data, rtol=0, atol=1e-6)
    assert not torch.allclose(head["head.weight"], state_of(run, "teacher")["fc.weight"], rtol=0, atol=1e-2)


def test_the_head_is_the_teachers_where_the_recipe_says_so(tiny_run: Run) -> None:
    teacher, assistant = state_of(tiny_run, "teacher"), state_of(tiny_run, "assistant")
    assert torch.equal(assistant["head.weight"], teacher["fc.weight"])
    assert torch.equal(assistant["head.bias"], teacher["fc.bias"])
    assert changed(state_of(tiny_run, "student"), assistant) == {"assistants", "assistant_adapters"}


def test_weights_say_what_they_were_trained_on(tiny_run: Run) -> None:
    for phase in ("teacher", "s0", "student", "assistant"):
        _, facts = load_tensors(tiny_run.weights(phase))
        assert facts == {
            "network": phase,
            "classes": [str(n) for n in range(10)],
            "mean": [0.305] * 3,
            "std": [0.318] * 3,
        }


def test_the_baseline_can_be_left_out(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    run = fit(tiny_recipe(*QUICK, "student.baseline=false", "data.val_fraction=0"), root=tmp_path)
    assert list(run.read_json("metrics.json")["parts"]) == ["fused", "student", "teacher"]
    assert {row["val_top1"] for row in rows(run)} == {None}
    assert all("val_top1_best" not in phase for phase in run.read_json("metrics.json")["phases"].values())
    with pytest.raises(CheckpointError, match=r"has no weights of phase 's0'. It was left out by the recipe"):
        load_part(run, "s0")


def test_an_unknown_part_is_refused(tiny_run: Run) -> None:
    with pytest.raises(UsageError, match=r"Unknown part 'fusd'\. Did you mean 'fused'\?"):
        load_part(tiny_run, "fusd")


def test_a_finished_run_is_given_back_as_it_is(tiny_run: Run) -> None:
    before = weights(tiny_run), tiny_run.metrics_path.stat().st_mtime_ns
    assert resume(tiny_run) is tiny_run
    assert (weights(tiny_run), tiny_run.metrics_path.stat().st_mtime_ns) == before


# Seeds


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # what was drawn before does not matter
        runs.append(fit(tiny_recipe(*QUICK, f"train.seed={seed}"), root=tmp_path / str(number)))
    assert weights(runs[0]) == weights(runs[1])
    assert rows(runs[0]) == rows(runs[1])
    others = weights(runs[2])
    assert all(content != others[name] for name, content in weights(runs[0]).items())


# The test images


def with_other_test_images(images: ImageSet) -> ImageSet:
    noise = torch.randint(0, 256, images.test.images_NCHW.shape, dtype=torch.uint8)
    return dataclasses.replace(images, test=Split(images_NCHW=noise, labels_N=images.test.labels_N.flip(0)))


def test_nothing_that_is_learnt_or_logged_depends_on_the_test_images(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned: with noise and wrong labels in their place every weight and every line of the log is the same."""
    recipe = tiny_recipe(*QUICK, "method.head=trained")
    clean = fit(recipe, root=tmp_path / "clean")
    monkeypatch.setattr(fitting, "load_images", lambda *how: with_other_test_images(load_images(*how)))
    poisoned = fit(recipe, root=tmp_path / "poisoned")
    assert weights(poisoned) == weights(clean)
    assert rows(poisoned) == rows(clean)


def test_the_test_images_are_read_once_for_each_part_at_the_end(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(*QUICK, "train.epochs=2")
    test = load_images(recipe.data, recipe.train.seed).test
    reads: list[tuple[bool, int]] = []
    predictions = evaluation.predictions

    def noting(module: nn.Module, split: Split, *rest: Any, **named: Any) -> Tensor:
        is_test = torch.equal(split.images_NCHW, test.images_NCHW) if len(split) == len(test) else False
        reads.append((is_test, len(list(tmp_path.glob("*/weights/*.safetensors")))))
        return predictions(module, split, *rest, **named)

    monkeypatch.setattr(evaluation, "predictions", noting)
    fit(recipe, root=tmp_path)
    assert [number for is_test, number in reads if is_test] == [4, 4, 4, 4]  # every phase was done
    assert reads[-4:] == [(True, 4)] * 4
    assert len(reads) == 4 + 2 * 4  # and the held-out images after every epoch


# What goes wrong on the way


def test_divergence_names_its_phase(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    message = r"ce is not finite from step \d of 5 in epoch \d of phase 'teacher'; .*Lower train\.lr"
    with pytest.raises(DivergenceError, match=message):
        fit(tiny_recipe("train.lr=1e6"), root=tmp_path)
    run = newest_run(tmp_path, finished=False)
    assert not run.weights("teacher").exists()


def test_weights_that_the_last_update_broke_are_not_kept(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """One step in all: its loss is finite, what it leaves is not."""
    recipe = tiny_recipe("train.batch_size=100", "train.epochs=1")
    object.__setattr__(recipe.train, "lr", 1e39)  # a recipe refuses it: no gradient is as large
    with pytest.raises(DivergenceError, match="a weight is not finite from epoch 1 of phase 'teacher'"):
        fit(recipe, root=tmp_path)
    assert not newest_run(tmp_path, finished=False).weights("teacher").exists()


def test_divergence_of_the_student_names_the_student(tmp_path: Path, tiny_recipe: MakeRecipe, pth: Path) -> None:
    how = (f"teacher.checkpoint={pth}", "student.baseline=false", "method.feature_weight=1e6", "train.lr=1e6")
    message = r"student, explained is not finite from step \d of 5 in epoch \d of phase 'student'"
    with pytest.raises(DivergenceError, match=message):
        fit(tiny_recipe(*how), root=tmp_path / "runs")


class FullFrom(Silent):
    """The disk is full from the end of an epoch on: no file may grow beyond a thousand bytes."""

    def __init__(self, epoch: int) -> None:
        self.left = epoch

    def epoch(self, row: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("data.train_limit=40", "data.test_limit=20", "student.baseline=false")
    whole = fit(recipe, root=tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for epoch, saved in ((1, None), (2, ("teacher", 1)), (4, ("student", 1))):
        root = tmp_path / str(epoch)
        try:
            with pytest.raises(StorageError, match=r"Could not write .*safetensors: File too large\. Free there: "):
                fit(recipe, root=root, display=FullFrom(epoch))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        run = newest_run(root, finished=False)
        assert not list(run.folder.rglob("*.tmp"))
        if saved is None:
            assert not run.checkpoint.exists()
        else:
            _, facts = load_tensors(run.checkpoint)
            assert (facts["phase"], facts["epoch"]) == saved
        resume(run)
        assert weights(run) == weights(whole)
        assert rows(run) == rows(whole)


def test_a_run_whose_facts_were_never_written_can_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(*QUICK)
    whole = fit(recipe, root=tmp_path / "a")
    begun = tmp_path / "b" / "tiny-001"
    begun.mkdir(parents=True)
    (begun / "recipe.toml").write_text(recipe.to_toml())
    run = resume(Run(begun))
    assert weights(run) == weights(whole)
    versions = [json.loads((folder / "environment.json").read_text())["versions"] for folder in (begun, whole.folder)]
    assert versions[0] == versions[1]
    assert versions[0]["torch"]
    assert sorted(os.listdir(begun)) == sorted(os.listdir(whole.folder))


# The average of the weights


def test_average_and_last_weights_are_both_kept_and_tested(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """Which of them ships changes names, and what the next phase builds on, and nothing before that."""
    how = ("data.train_limit=60", "data.test_limit=20", "method.name=kd", "train.ema_decay=0.5", "train.epochs=3")
    last, ema = (fit(tiny_recipe(*how, f"train.ship={ship}"), root=tmp_path / ship) for ship in ("last", "ema"))
    assert {path.stem for path in (last.folder / "weights").iterdir()} == {"teacher", "teacher_ema", "s0", "s0_ema"}
    assert {path.stem for path in (ema.folder / "weights").iterdir()} == {"teacher", "teacher_last", "s0", "s0_last"}
    for shipped, other in (("teacher", "teacher_last"), ("teacher_ema", "teacher")):
        ours, theirs = state_of(last, shipped), state_of(ema, other)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert changed(state_of(last, "teacher"), state_of(last, "teacher_ema")) >= {"conv1", "fc"}
    assert changed(state_of(last, "s0"), state_of(ema, "s0_last")) >= {"conv1", "fc"}  # taught by another T
    tested = [run.read_json("metrics.json")["parts"]["teacher"] for run in (last, ema)]
    assert tested[0]["test_top1"] == tested[1]["test_top1_last"]
    assert tested[0]["test_top1_ema"] == tested[1]["test_top1"]
    assert all(row["val_top1_ema"] is not None for row in rows(last))
    for run, name in ((last, "teacher"), (ema, "teacher")):
        ships = load_part(run, name).state_dict()
        assert all(torch.equal(value, state_of(run, name)[key]) for key, value in ships.items())


# What a person and a script are told


class Recorder(Silent):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int, int]] = []

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.events.append((name, epochs, steps_per_epoch, 0))

    def step(self) -> None:
        self.events[-1] = (*self.events[-1][:3], self.events[-1][3] + 1)


def test_the_evaluation_at_the_end_moves_a_bar_to_its_end(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "EVALUATED_AT_ONCE", 8)  # of 20 images: 3 batches for each of two parts
    display = Recorder()
    run = fit(tiny_recipe(*QUICK, "method.name=kd"), root=tmp_path, display=display)
    assert display.events[-1] == ("test", 1, 6, 6)
    metrics = run.read_json("metrics.json")
    assert metrics["training_seconds"] == pytest.approx(sum(row["seconds"] for row in read_log(run.log.path)))
    assert 50 < metrics["peak_memory_mb"] < 100_000


def test_long_epochs_are_saved_on_the_way(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """At zero minutes, after every step; and that changes nothing."""
    places: list[tuple[str, int, int]] = []

    class Looking(Silent):
        def step(self) -> None:
            for path in tmp_path.glob("often/*/checkpoint.safetensors"):
                _, facts = load_tensors(path)
                places.append((facts["phase"], facts["epoch"], facts["batch"]))

    how = (*QUICK, "method.name=cross_entropy", "train.batch_size=12")
    often = fit(tiny_recipe(*how, "train.checkpoint_minutes=0.0"), root=tmp_path / "often", display=Looking())
    seldom = fit(tiny_recipe(*how), root=tmp_path / "seldom")
    assert places == [("s0", 0, 1), ("s0", 0, 2)]  # seen in steps 2 and 3
    assert weights(often) == weights(seldom)
    assert rows(often) == rows(seldom)


def test_a_teacher_lr_is_the_teachers_alone(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    how = (*QUICK, "train.schedule=constant", "student.baseline=false", "teacher.lr=0.02")
    run = fit(tiny_recipe(*how), root=tmp_path)
    assert {row["phase"]: row["lr"] for row in rows(run)} == {"teacher": 0.02, "student": 0.05, "assistant": 0.05}

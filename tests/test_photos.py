"""A folder of real photos from training to a prediction of the exported file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rkd_deploy
from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.sources import FileSplit, load_images
from rkd_deploy.errors import InterruptedTraining, RecipeError
from rkd_deploy.pipeline import export_run
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.preparation import data_of
from rkd_deploy.train.runs import Run, open_run
from rkd_deploy.train.weights import load_tensors, save_tensors


def recipe(photos: Path, *overrides: str) -> Recipe:
    base = (
        "name=photos",
        "data.name=imagefolder",
        f"data.root={photos}",
        "data.image_size=16",
        "data.crop_fraction=0.8",
        "data.cache=off",
        "data.workers=0",
        "data.mixup=0.2",
        "data.cutmix=1.0",
        "data.label_smoothing=0.1",
        "teacher.name=resnet8",
        "student.name=resnet8",
        "method.name=cross_entropy",
        "train.epochs=2",
        "train.batch_size=4",
        "train.lr=0.02",
        "train.device=cpu",
        "train.threads=1",
    )
    return read_recipe(None, (*base, *overrides))


def weights(run: Run) -> dict[str, dict[str, Any]]:
    return {path.stem: load_tensors(path)[0] for path in sorted((run.folder / "weights").iterdir())}


def same(one: Run, other: Run) -> bool:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name][key], theirs[name][key]) for name in ours for key in ours[name])


class StopAfter(Silent):
    """Sends this process SIGTERM after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_exported_file_answers_a_photo_as_evaluation_did(photos: Path) -> None:
    """From a non-square file: the resize that accuracy was measured with is the one that is deployed."""
    from PIL import Image

    for number, path in enumerate(sorted((photos / "val").glob("*/*"))):
        with Image.open(path) as image:
            image.resize((300 + 20 * number, 200)).save(path, quality=95)
    run = fit(recipe(photos, "data.label_smoothing=0.1"), root=photos.parent / "runs")
    made = export_run(run)
    facts = run.read_json("facts.json")
    assert facts["sources"]["test"] == "folder val"
    assert facts["skipped"] == 0
    test = load_images(run.facts.normalised(run.recipe.data), 0).test
    assert isinstance(test, FileSplit)
    model, normalise = load_part(run, "s0"), Normaliser(facts["mean"], facts["std"], torch.device("cpu"))
    with torch.inference_mode():
        evaluated = model(normalise(torch.cat(list(test.chunks(4))))).numpy()
    paths = [test.source.name(position) for position in range(len(test))]
    with rkd_deploy.load(made.folder) as classifier:
        assert classifier.card.preprocess.crop_fraction == 0.8
        assert classifier.card.metrics["split"] == "imagefolder test: folder val"
        served = classifier.logits(paths)
        best = [classifier.predict(path)[0].index for path in paths]
    np.testing.assert_allclose(served, evaluated, rtol=0, atol=1e-5)
    assert best == evaluated.argmax(1).tolist()
    right = 100 * float((evaluated.argmax(1) == test.labels_N.numpy()).mean())
    assert run.read_json("metrics.json")["parts"]["s0"]["test_top1"] == pytest.approx(right)
    assert made.proof.onnx_top1 == pytest.approx(right)
    assert made.proof.images == 6


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_stopped_run_ends_in_the_bits_of_one_that_was_not(photos: Path, cache: str) -> None:
    asked = recipe(photos, f"data.cache={cache}", "data.augment=['resized_crop','flip','randaugment']")
    whole = fit(asked, root=photos.parent / "whole")
    with pytest.raises(InterruptedTraining):
        fit(asked, root=photos.parent / "cut", display=StopAfter(6))  # in the middle of an epoch
    begun = open_run(photos.parent / "cut" / "photos-001")
    assert same(resume(begun), whole)
    other = fit(recipe(photos, "train.seed=1"), root=photos.parent / "other")
    assert not same(other, whole)


def test_a_resumed_run_is_normalised_as_it_began(photos: Path) -> None:
    with pytest.raises(InterruptedTraining):
        fit(recipe(photos), root=photos.parent / "runs", display=StopAfter(1))
    run = open_run(photos.parent / "runs" / "photos-001")
    facts = run.read_json("facts.json")
    assert run.facts.normalised(run.recipe.data).mean == tuple(facts["mean"])
    assert data_of(run.recipe).mean is None


def test_the_teachers_normalisation_comes_from_the_recipe_or_its_weights(
    photos: Path, tmp_path: Path, tiny_run: Run, tiny_recipe: Callable[..., Recipe]
) -> None:
    state, facts = load_tensors(tiny_run.weights("teacher"))
    path = tmp_path / "t.safetensors"
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save_tensors(path, state, {**facts, "mean": mean, "std": std})
    asked = tiny_recipe("data.normalisation=teacher", f"teacher.checkpoint={path}")
    assert (data_of(asked).mean, data_of(asked).std) == (tuple(mean), tuple(std))
    stated = tiny_recipe("data.normalisation=teacher", "teacher.mean=[0.5,0.5,0.5]", "teacher.std=[0.2,0.2,0.2]")
    assert (data_of(stated).mean, data_of(stated).std) == ((0.5,) * 3, (0.2,) * 3)
    assert load_images(data_of(stated), 0).mean == (0.5,) * 3
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(RecipeError, match=r"t\.pth does not say how its images were normalised"):
        data_of(tiny_recipe("data.normalisation=teacher", f"teacher.checkpoint={tmp_path / 't.pth'}"))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5,) * 3, (0.5,) * 3)
TIMM = "timm:vit_tiny_patch16_224"
"""Published with a normalisation of its own."""


@pytest.mark.parametrize(
    ("overrides", "normalisation"),
    [
        (["data.normalisation=imagenet"], IMAGENET),
        (["teacher.name=tv:resnet18", "teacher.pretrained=true"], IMAGENET),
        ([f"teacher.name={TIMM}", "teacher.pretrained=true"], HALVES),
        ([f"student.name={TIMM}", "student.pretrained=true"], HALVES),
        (
            [f"student.name={TIMM}", "student.pretrained=true", "teacher.name=tv:resnet18", "teacher.pretrained=true"],
            IMAGENET,
        ),
        ([f"teacher.name={TIMM}", "teacher.pretrained=true", "data.normalisation=teacher"], HALVES),
        ([f"teacher.name={TIMM}", "teacher.pretrained=true", "data.normalisation=imagenet"], IMAGENET),
        ([f"teacher.name={TIMM}", "teacher.pretrained=true", "data.std=[0.1,0.2,0.3]"], (HALVES[0], (0.1, 0.2, 0.3))),
        ([f"teacher.name={TIMM}", "teacher.pretrained=true", "data.normalisation=data"], ((0.305,) * 3, (0.318,) * 3)),
        ([], ((0.305,) * 3, (0.318,) * 3)),
    ],
)
def test_the_normalisation_of_published_weights_is_taken_by_itself(
    tiny_recipe: Callable[..., Recipe], overrides: list[str], normalisation: tuple[tuple[float, ...], ...]
) -> None:
    images = load_images(data_of(tiny_recipe(*overrides)), 0)
    assert (images.mean, images.std) == normalisation


def test_imagenet_is_a_word_for_photos_too(photos: Path) -> None:
    images = load_images(recipe(photos, "data.normalisation=imagenet").data, 0)
    assert (images.mean, images.std) == IMAGENET
    with pytest.raises(RecipeError, match=r'data\.mean and data\.std go before data\.normalisation = "imagenet"'):
        recipe(photos, "data.normalisation=imagenet", "data.mean=[0.5,0.5,0.5]")


def test_skipped_photos_are_counted_in_the_facts(photos: Path) -> None:
    (photos / "train" / "n01440764" / "bad.jpg").write_text("no photo")
    run = fit(recipe(photos, "data.broken=skip", "train.epochs=1"), root=photos.parent / "runs")
    facts = json.loads((run.folder / "facts.json").read_text())
    assert facts["skipped"] == 1
    assert "bad.jpg" in facts["first_skipped"][0]

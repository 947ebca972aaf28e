"""The recipes in train/: each parses, and takes two steps of every phase on real images."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from rkd_deploy.data.loader import Normaliser, train_loader
from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.train import networks
from rkd_deploy.train.methods.baseline import CrossEntropy
from rkd_deploy.train.phases import Planner
from rkd_deploy.train.preparation import gather_facts
from rkd_deploy.train.stepping import Stepper, learning_rate

RECIPES = sorted((Path(__file__).parents[2] / "train").glob("*.toml"))
CIFAR100 = [path for path in RECIPES if path.stem.startswith("cifar100_")]
# Table 3.2 and 3.3 of the project's collection: T and S0 on the test images.
PUBLISHED = {
    ("resnet56", "resnet20"): ("72.34", "69.06"),
    ("resnet110", "resnet32"): ("74.31", "71.14"),
    ("resnet32x4", "resnet8x4"): ("79.42", "72.50"),
    ("wrn_40_2", "wrn_16_2"): ("75.61", "73.26"),
    ("wrn_40_2", "wrn_40_1"): ("75.61", "71.98"),
    ("vgg13", "vgg8"): ("74.64", "70.36"),
    ("resnet32x4", "shufflenetv1"): ("79.42", "70.50"),
    ("resnet32x4", "shufflenetv2"): ("79.42", "71.82"),
    ("vgg13", "mobilenetv2"): ("74.64", "64.60"),
    ("resnet50", "mobilenetv2"): ("79.34", "64.60"),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_states_what_a_reader_needs(path: Path) -> None:
    recipe, text = read_recipe(path), path.read_text(encoding="utf-8")
    assert recipe.name == path.stem
    assert f"rkd-deploy train train/{path.name}" in text
    for name in ("Command", "Teacher", "Time", "Budget", "Published", "Result"):
        assert re.search(rf"^# {name}: +\S", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 120
    # Another method over the same recipe is one --set: no key of residual distillation is in the way.
    for name in ("kd", "at", "cross_entropy"):
        assert read_recipe(path, [f"method.name={name}"]).method.name == name


def test_every_published_pair_has_its_recipe() -> None:
    pairs = {(recipe.teacher.name, recipe.student.name) for recipe in map(read_recipe, CIFAR100)}
    assert pairs == set(PUBLISHED)


@pytest.mark.parametrize("path", CIFAR100, ids=lambda path: path.stem)
def test_a_recipe_of_a_published_row_is_the_published_protocol(path: Path) -> None:
    recipe, text = read_recipe(path), path.read_text(encoding="utf-8")
    t, s0 = PUBLISHED[recipe.teacher.name, recipe.student.name]
    assert f"T {t}, S0 {s0}, KD" in text
    macs = count(_made(recipe.student.name), 32).macs
    assert f"{macs / 1e6:.1f} MMAC, those of S0" in text
    train, light = recipe.train, recipe.student.name.startswith(("mobilenet", "shufflenet"))
    assert (train.epochs, train.batch_size, train.momentum, train.nesterov) == (240, 64, 0.9, False)
    assert (train.weight_decay, recipe.data.val_fraction, recipe.data.augment) == (5e-4, 0, ("crop", "flip"))
    rates = [learning_rate(train, epoch, 240, 1) for epoch in (0, 149, 150, 180, 210, 239)]
    peak = 0.01 if light else 0.05
    assert rates == pytest.approx([peak, peak, peak / 10, peak / 100, peak / 1000, peak / 1000])
    assert (recipe.teacher.lr or train.lr) == 0.05


@functools.cache
def _made(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.create(name, 100)


@pytest.mark.parametrize("path", CIFAR100, ids=lambda path: path.stem)
def test_two_steps_of_every_phase_on_real_images(path: Path, cifar100: ImageSet) -> None:
    phases = two_steps_of_every_phase(read_recipe(path), cifar100)
    assert phases == ["teacher", "s0", "control", "student", "assistant"]


def test_two_steps_of_imagenets_recipe_on_photos_in_its_layout(photos: Path) -> None:
    """Its T and S0 come with published weights, which cannot be had here: fresh ones stand in, and T is trained too."""
    (path,) = set(RECIPES) - set(CIFAR100)
    recipe = read_recipe(path, [f"data.root={photos}", "teacher.pretrained=false", "train.amp=false"])
    images = load_images(recipe.data, recipe.train.seed)
    assert (len(images.classes), images.image_size) == (3, (224, 224))
    assert two_steps_of_every_phase(recipe, images) == ["teacher", "s0", "control", "student", "assistant"]


def two_steps_of_every_phase(recipe: Recipe, images: ImageSet) -> list[str]:
    """As `fit` takes them, but for the epochs and the evaluation: the teachers are too heavy for those here."""
    originals = networks.build_originals(recipe, len(images.classes), images.image_size)
    facts = gather_facts(recipe, images, originals)
    assert facts.separation is not None
    assert facts.separation.cost <= facts.separation.budget
    device = torch.device("cpu")
    nets = networks.build_networks(recipe, facts, originals, device)
    for net in (nets.teacher, nets.s0, nets.model):
        assert net is not None
        for layer in net.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0  # two batches must do: fresh statistics let the maps of 110 frozen layers explode
    loader = train_loader(
        recipe.data,
        images.train,
        Normaliser(images.mean, images.std, device),
        classes=len(images.classes),
        batch_size=4,
        seed=recipe.train.seed,
    )
    x_NCHW, y_N = next(loader.epoch(0))
    phases = []
    for plan in Planner(recipe, facts, nets).plans(set()):
        method = plan.method()
        stepper = Stepper(method, recipe.train)
        stepper.start_epoch(1)
        before = {key: value.clone() for key, value in plan.product.state_dict().items()}
        for _ in range(2):
            losses = stepper.step(x_NCHW, y_N, 1e-3)
            assert losses.total.isfinite()
        after = plan.product.state_dict()
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(value, before[key]) for key, value in after.items())
        assert isinstance(method, CrossEntropy) is (plan.name == "teacher")  # S0, the control, learns S's base loss too
        phases.append(plan.name)
    return phases

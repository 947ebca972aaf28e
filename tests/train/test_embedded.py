"""The recipe inside the package: digits, and for image files that of photos, by where weights come from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkd_deploy.cli import app
from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.train import embedded
from rkd_deploy.train.embedded import embedded_recipe

README = Path(__file__).parents[2] / "README.md"
FILES = ("data.name=imagefolder", "data.root=photos")


def line_of_readme() -> list[str]:
    """The overrides of the command under "Your photos"."""
    section = README.read_text(encoding="utf-8").partition("## Your photos")[2]
    command = section.partition("```bash\n")[2].partition("\nrkd-deploy export")[0].replace("\\\n", " ")
    words = shlex.split(command, comments=True)
    assert words[:2] == ["rkd-deploy", "train"]
    return words[3::2]


def lengths(recipe: Recipe) -> tuple[object, ...]:
    """Epochs and rates of S, A and S0, then those of T."""
    return recipe.train.epochs, recipe.train.lr, recipe.teacher.epochs, recipe.teacher.lr


def test_the_line_of_the_readme_gets_what_photos_need_and_nothing_of_digits() -> None:
    recipe = embedded_recipe(line_of_readme())
    assert recipe.name == "photos"
    assert recipe.data.image_size >= 128  # type: ignore[operator]
    assert recipe.data.augmentations == ("resized_crop", "flip")
    assert (recipe.student.name, recipe.student.fraction) == ("teacher", 0.5)
    assert (recipe.method.scheme, recipe.method.loss, recipe.method.classifier) == ("end_to_end", "dkd", "finetuned")
    assert recipe.train.schedule == "cosine"
    assert recipe.train.threads is None
    assert recipe.train.epochs >= 30


@pytest.mark.parametrize("name", ["imagefolder", "imagenet", "webdataset", " 'imagefolder'"])
def test_every_set_of_files_is_taken_for_photos(name: str) -> None:
    assert embedded_recipe([f"data.name={name}", "data.root=x"]).train.batch_size == 64


def test_other_sets_begin_with_the_recipe_of_digits() -> None:
    digits = Path(embedded.__file__).with_name("digits.toml")
    assert embedded_recipe() == read_recipe(digits)
    assert embedded_recipe(["train.epochs=3"]) == read_recipe(digits, ["train.epochs=3"])
    with pytest.raises(RecipeError, match=r"data\.root"):  # digits lie in scikit-learn
        embedded_recipe(["data.root=photos"])


@pytest.mark.parametrize(
    ("more", "side", "expected"),
    [
        ([], 128, (30, 0.02, 120, 0.1)),
        (["teacher.checkpoint=t.pth"], 224, (30, 0.02, None, None)),
        (["teacher.pretrained=true"], 224, (30, 0.02, 30, 0.02)),
        (["student.weights=fresh"], 128, (120, 0.1, 120, 0.1)),
        (["student.name=tv:mobilenet_v3_small"], 128, (120, 0.1, 120, 0.1)),
        (["student.name=tv:mobilenet_v3_small", "student.pretrained=true"], 224, (30, 0.02, 120, 0.1)),
        (["student.name=resnet8", "method.scheme=progressive"], 128, (120, 0.1, 120, 0.1)),
        (["method.scheme=progressive"], 128, (120, 0.1, 120, 0.1)),
        (["method.name=kd"], 128, (30, 0.02, 120, 0.1)),
    ],
)
def test_size_length_and_rate_go_by_where_weights_come_from(
    more: list[str], side: int, expected: tuple[object, ...]
) -> None:
    recipe = embedded_recipe([*FILES, *more])
    assert recipe.data.image_size == side
    assert lengths(recipe) == expected


def test_what_is_set_by_hand_goes_first_and_t_follows_train() -> None:
    by_hand = ["data.image_size=64", "student.fraction=0.3", "train.epochs=2", "train.lr=0.5", "train.weight_decay=0"]
    recipe = embedded_recipe([*FILES, *by_hand, "data.augment=['crop']", "name=mine"])
    assert (recipe.name, recipe.data.image_size, recipe.data.augment) == ("mine", 64, ("crop",))
    assert (recipe.student.fraction, recipe.train.weight_decay) == (0.3, 0)
    assert lengths(recipe) == (2, 0.5, None, None)
    assert lengths(embedded_recipe([*FILES, "train.epochs=2", "teacher.epochs=9"])) == (2, 0.02, 9, 0.1)


def test_the_photo_line_trains_with_these_values(photos: Path) -> None:
    small = ("teacher.name=resnet8", "data.image_size=16", "train.epochs=1", "train.threads=1", "student.fraction=0.9")
    overrides = [*FILES[:1], f"data.root={photos}", *small]
    words = [word for override in overrides for word in ("--set", override)]
    answer = CliRunner().invoke(app, ["train", *words, "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    run = Path(json.loads(answer.stdout)["run"])
    assert run.name == "photos-001"
    recipe = read_recipe(run / "recipe.toml")
    assert recipe == embedded_recipe(overrides)
    assert (recipe.train.lr, recipe.teacher.lr, recipe.train.clip_norm) == (0.02, 0.1, 5.0)

"""The reference of recipe keys: complete, readable as a recipe, and the page of it."""

from __future__ import annotations

import dataclasses

import pytest

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.recipe.keys import keys_as_toml, recipe_keys
from rkd_deploy.recipe.rules import ReadWhere, check_keys, key


def test_every_key_has_its_meaning_and_its_default():
    keys = recipe_keys()
    recipe = Recipe()
    tables = [table.name for table in dataclasses.fields(recipe)[1:]]
    assert [(key.table, key.name) for key in keys] == [
        (table, field.name) for table in tables for field in dataclasses.fields(getattr(recipe, table))
    ]
    assert all(key.meaning[-1] not in ",;" and len(key.meaning) > 5 for key in keys)
    defaults = {(key.table, key.name): key.default for key in keys}
    assert defaults["train", "batch_size"] == "64"
    assert defaults["data", "root"] is None
    assert defaults["method", "name"] == '"residual"'


def test_range_and_where_a_key_is_read_come_from_its_rule():
    keys = {(key.table, key.name): key for key in recipe_keys()}
    share = keys["student", "assistant_share"]
    assert (share.range, share.read) == ("0.01 to 0.9", None)
    assert share.sentences == f"{share.meaning} Range: 0.01 to 0.9."
    threads = keys["student", "latency_threads"]
    assert (threads.range, threads.read) == ("1 to 4096", 'with student.budget = "latency"')
    assert threads.sentences == f'{threads.meaning} Range: 1 to 4096. Read only with student.budget = "latency".'
    assert (keys["train", "amp"].range, keys["train", "amp"].read) == (None, None)


@dataclasses.dataclass
class Oven:
    heat: float = key(180.0, low=50, high=250)
    modes: tuple[str, ...] = key((), choices=("top", "fan"))
    grams: tuple[int, ...] | None = key(None, low=1)
    stone: bool = key(False, read=ReadWhere("with top heat", lambda oven: "top" in oven.modes))


@pytest.mark.parametrize(
    ("oven", "message"),
    [
        (Oven(heat=300.0), r"oven\.heat = 300\.0 must be between 50 and 250"),
        (Oven(heat=float("nan")), r"oven\.heat = nan must be"),
        (Oven(modes=("fan", "grill")), r"Unknown value of oven\.modes 'grill'\. Choices: fan, top"),
        (Oven(grams=(5, 0)), r"oven\.grams = 0 must be between 1 and 1000000"),
        (
            Oven(modes=("fan",), stone=True),
            r"oven\.stone = true has no effect with fan heat: it is read only with top heat\. "
            r"Leave it out, or --set oven\.stone=false\.$",
        ),
    ],
)
def test_a_rule_says_no(oven, message):
    check_keys("oven", Oven(heat=50.0, modes=("top", "fan"), grams=(1,), stone=True), "any heat")
    with pytest.raises(RecipeError, match=message):
        check_keys("oven", oven, "fan heat")


def test_the_reference_is_a_recipe_of_all_defaults(tmp_path):
    file = tmp_path / "all.toml"
    file.write_text(keys_as_toml(), encoding="utf-8")
    assert read_recipe(file) == Recipe()


def test_train_prints_it(rkd):
    shown = rkd("train", "--keys")
    assert shown.code == 0
    assert shown.out == keys_as_toml()
    as_json = rkd("train", "--keys", "--json").json["keys"]
    assert as_json[0] == dataclasses.asdict(recipe_keys()[0])


@pytest.mark.parametrize("option", [["--resume"], ["--seeds", "0,1"], ["--set", "train.epochs=1"]])
def test_nothing_is_trained_beside_it(rkd, option):
    assert rkd("train", "--keys", *option).code == 2

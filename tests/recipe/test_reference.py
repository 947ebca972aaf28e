"""The reference of recipe keys: complete, readable as a recipe, and the page of it."""

from __future__ import annotations

import dataclasses

import pytest

from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.recipe.keys import keys_as_toml, recipe_keys


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

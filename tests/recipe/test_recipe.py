"""Recipes from a file and with --set; misspelt words and broken files are named."""

from __future__ import annotations

import dataclasses
import string
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import DataRecipe, MethodRecipe, Recipe, TeacherRecipe, TrainRecipe, parse_recipe, read_recipe
from rkd_deploy.train.embedded import embedded_recipe

REPO = Path(__file__).parents[2]
TOMLS = [*sorted((REPO / "rkd_deploy" / "train").glob("*.toml")), *sorted((REPO / "train").glob("**/*.toml"))]
TABLES = ("data", "teacher", "student", "method", "train")
KEYS = [f"{table}.{key}" for table in TABLES for key in typing.get_type_hints(typing.get_type_hints(Recipe)[table])]


def test_the_empty_recipe_is_the_defaults() -> None:
    assert parse_recipe({}) == Recipe() == read_recipe()
    assert Recipe().data.name == "digits"


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_every_recipe_that_ships_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe != Recipe(name=path.stem)  # something in it was understood


def test_there_are_recipes_that_ship() -> None:
    assert all(path.is_file() for path in TOMLS)
    assert len(TOMLS) >= 2


def test_values_are_taken_from_the_file(tmp_path: Path) -> None:
    text = """
        [data]
        augment = ["flip"]
        mean = [0, 0.5, 1]
        [teacher]
        checkpoint = "t.pth"
        [train]
        lr = 1
        amp = true
        milestones = [1, 2]
    """
    (tmp_path / "mine.toml").write_text(text)
    assert read_recipe(tmp_path / "mine.toml") == Recipe(
        name="mine",
        data=DataRecipe(augment=("flip",), mean=(0.0, 0.5, 1.0)),
        teacher=TeacherRecipe(checkpoint="t.pth"),
        train=TrainRecipe(lr=1.0, amp=True, milestones=(1, 2)),
    )


def test_a_recipe_in_a_run_folder_is_named_after_the_folder(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "recipe.toml").write_text("")
    assert read_recipe(tmp_path / "exp" / "recipe.toml").name == "exp"


# --set


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("train.epochs=5", "train", "epochs", 5),
        (" train.epochs =5", "train", "epochs", 5),
        ("train.lr=1e-3", "train", "lr", 0.001),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.amp=true", "train", "amp", True),
        ("teacher.name=resnet56", "teacher", "name", "resnet56"),
        ("teacher.name='resnet56'", "teacher", "name", "resnet56"),
        ('teacher.name="resnet56"', "teacher", "name", "resnet56"),
        ("teacher.checkpoint=/some/where=odd dir", "teacher", "checkpoint", "/some/where=odd dir"),
        ("data.augment=[]", "data", "augment", ()),
        ("data.augment=['flip']", "data", "augment", ("flip",)),
        ("data.mean=[0.5, 0.5, 0.5]", "data", "mean", (0.5, 0.5, 0.5)),
        ("train.milestones=[3, 4]", "train", "milestones", (3, 4)),
    ],
)
def test_set_replaces_one_value(override: str, table: str, key: str, value: object) -> None:
    recipe = read_recipe(None, [override])
    changed = dataclasses.replace(getattr(Recipe(), table), **{key: value})
    assert recipe == dataclasses.replace(Recipe(), **{table: changed})
    assert type(getattr(getattr(recipe, table), key)) is type(value)


def test_set_wins_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[train]\nepochs = 3\nlr = 0.5\n")
    train = read_recipe(tmp_path / "r.toml", ["train.epochs=4", "train.epochs=5"]).train
    assert (train.epochs, train.lr) == (5, 0.5)


def test_set_replaces_the_name() -> None:
    assert read_recipe(None, ["name=other"]).name == "other"


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs",
        "epochs=5",
        "=5",
        "",
        "train",
        "train=5",
        "name.foo=1",
        "name.=1",
        "train.lr=1\n[data]\nname='cifar10'",
        "data.root=a\nb",
        "data.root=" + "x" * 10_000,
        "train.epochs='''\n5'''",
    ],
)
def test_set_of_another_form_is_refused_with_an_example(override: str) -> None:
    with pytest.raises(
        RecipeError, match=r"is not of the form table\.key=value, e\.g\. --set train\.epochs=5"
    ) as caught:
        read_recipe(None, [override])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.epochs=5", "Unknown recipe table 'trian'. Did you mean 'train'? Choices: data, method, name, "),
        ("train.epoch=5", "Unknown recipe key 'train.epoch'. Did you mean 'train.epochs'? Choices: train.accumulate, "),
        ("train.lr.deep=5", "Unknown recipe key 'train.lr.deep'"),
        ("train.epochs=five", "train.epochs = 'five' must be of type int."),
    ],
)
def test_set_of_a_wrong_name_or_value_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, [override])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("value", "name"), [("2026", "2026"), ("'a b'", "a b"), ("true", "true"), ("1.50", "1.50")])
def test_a_run_may_be_called_by_what_is_no_text_in_toml(value: str, name: str) -> None:
    assert read_recipe(None, [f"name={value}"]).name == name


@pytest.mark.parametrize("opening", ["[", "{a=", "{a.", "a.a"])
def test_what_is_nested_100_000_deep_is_one_error(tmp_path: Path, opening: str) -> None:
    """Whether TOML gives up at its depth, or a value of no use is made of it: dotted keys are tables in tables."""
    deep = "a" + ".a" * 50_000
    content = f"[data]\nroot = {{{deep} = 1}}" if opening == "a.a" else f"[data]\nroot = {opening * 100_000}"
    (tmp_path / "r.toml").write_text(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "r.toml")
    assert len(str(caught.value)) < 500
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, [f"train.epochs={opening * 3000}"])
    assert len(str(caught.value)) < 500


def test_one_text_is_no_list_of_overrides() -> None:
    with pytest.raises(RecipeError, match="a path and a list of texts such as train"):
        read_recipe(None, "train.epochs=5")


def test_images_of_files_name_a_recipe_that_has_no_name(tmp_path: Path) -> None:
    files = ["data.name=imagefolder", f"data.root={tmp_path}/my flowers/"]
    assert read_recipe(None, files).name == embedded_recipe(files).name == "my flowers"
    assert embedded_recipe().name == "digits"
    assert embedded_recipe([*files, "name=x"]).name == "x"
    assert DataRecipe(name="imagefolder", root=".").folder_name == Path.cwd().name
    assert DataRecipe(name="webdataset", root="/mnt/plants/train-{000..511}.tar").folder_name == "plants"
    assert DataRecipe(name="cifar10", root="/data/x").folder_name == ""
    (tmp_path / "r.toml").write_text(f"[data]\nname = 'imagefolder'\nroot = '{tmp_path}'\n")
    assert read_recipe(tmp_path / "r.toml").name == "r"


def test_set_into_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("train = 5\n")
    with pytest.raises(RecipeError, match=r"train is not a table, so --set 'train\.lr=1' cannot be applied"):
        read_recipe(tmp_path / "r.toml", ["train.lr=1"])


# Errors: each names the key, the value and the rule.


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_is_answered_with_the_right_one(key: str) -> None:
    table, name = key.split(".")
    for wrong in (name[:-1] + "_x", name + "s"):
        with pytest.raises(RecipeError) as caught:
            parse_recipe({table: {wrong: 1}})
        assert f"Unknown recipe key '{table}.{wrong}'. Did you mean '{key}'?" in str(caught.value)


@pytest.mark.parametrize("table", TABLES)
def test_a_misspelt_table_is_answered_with_the_right_one(table: str) -> None:
    with pytest.raises(RecipeError, match=rf"Unknown recipe table '{table}s'\. Did you mean '{table}'\?"):
        parse_recipe({table + "s": {}})
    with pytest.raises(RecipeError, match=rf"{table} = 3 must be a table: write \[{table}\]"):
        parse_recipe({table: 3})


@pytest.mark.parametrize("name", ["", "../up", "/etc/x", "a/b", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"must not be empty or hold a slash"):
        parse_recipe({"name": name})


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"name = 3 must be of type str"):
        parse_recipe({"name": 3})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(RecipeError, match=rf"No recipe can be read at {path}: "):
            read_recipe(path)


def test_what_is_no_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[train]\nlr = = 1\n")
    with pytest.raises(RecipeError, match=r"r\.toml is not valid TOML: .*line 2"):
        read_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(RecipeError, match=r"No recipe can be read at .*utf-8"):
        read_recipe(tmp_path / "r.toml")


values = st.text(alphabet=string.printable, max_size=30) | st.floats().map(repr) | st.integers().map(str)


@given(st.sampled_from([*KEYS, "name", "train.other", "other.lr"]), values)
def test_anything_after_set_gives_a_recipe_or_an_error_of_recipes(key: str, value: str) -> None:
    try:
        recipe = read_recipe(None, [f"{key}={value}"])
    except RecipeError:
        return  # a refusal is an answer; any other exception is none
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


# Another method by --set


def test_another_method_begins_a_table_of_its_own(tmp_path: Path) -> None:
    """What a file says of residual distillation is no setting of a baseline; the rest of the file stays."""
    file = tmp_path / "r.toml"
    file.write_text('[method]\nname = "residual"\nbase = "at"\nbase_weight = 500.0\n[train]\nepochs = 7\n')
    other = read_recipe(file, ["method.temperature=2.0", "method.name=kd"])
    assert other.method == MethodRecipe(name="kd", temperature=2.0)
    assert other.train.epochs == 7
    for same in ([], ["method.name=residual"], ["method.head=trained"]):
        method = read_recipe(file, same).method
        assert (method.base, method.base_weight) == ("at", 500.0)
    file.write_text("[method]\nfeature_weight = 2.0\n")  # a file without a name means residual
    assert read_recipe(file, ["method.name=residual"]).method.feature_weight == 2.0
    assert read_recipe(file, ["method.name=dkd"]).method == MethodRecipe(name="dkd")
    with pytest.raises(RecipeError, match=r"method\.base = \"at\" has no effect"):
        read_recipe(file, ["method.name=kd", "method.base=at"])  # set beside it, it is meant


def test_a_key_that_is_no_more_names_its_successor_and_is_left_out_of_earlier_runs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.kl_weight is a key no more: .*method\.base_weight"):
        read_recipe(None, ["method.scheme=end_to_end", "method.kl_weight=0.5"])
    (tmp_path / "recipe.toml").write_text('[method]\nscheme = "end_to_end"\nbase = "none"\nkl_weight = 1.0\n')
    (tmp_path / "facts.json").write_text("{}")
    assert read_recipe(tmp_path / "recipe.toml").method.loss == "none"


def test_an_earlier_run_may_state_defaults_of_its_time_for_keys_that_it_does_not_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[method]\ndkd_beta = 8.5\ntemperature = 3.0\nbase = "kd"\n[data]\ncache_gb = 3.5\n[student]\nlabels = "x"\n'
    )
    with pytest.raises(RecipeError, match="has no effect"):
        read_recipe(file)  # a user's own file: a misunderstanding
    (tmp_path / "facts.json").write_text("{}")
    recipe = read_recipe(file)
    assert recipe.method == MethodRecipe(base="kd", temperature=3.0)  # what is read stays as it is stated
    assert (recipe.data, recipe.student.labels) == (Recipe().data, None)
    file.write_text("[method]\nstages = 3\n")  # damaged: an error that names it, as without the facts
    with pytest.raises(RecipeError, match=r"method\.stages = 3 must be a list"):
        read_recipe(file)


def test_the_end_to_end_scheme_has_defaults_of_its_own() -> None:
    method = read_recipe(None, ["method.scheme=end_to_end"]).method
    assert (method.loss, method.classifier) == ("dkd", "finetuned")
    method = read_recipe(None).method
    assert (method.loss, method.classifier) == ("none", "teacher")


@pytest.mark.parametrize(
    ("method", "beta"),
    [
        ('scheme = "sequential"\nbase = "none"', 2.0),  # stated, as every key is, and not read
        ('name = "kd"', 2.0),
        ('base = "dkd"', 8.0),
        ('name = "dkd"', 8.0),
        ('scheme = "end_to_end"', 8.0),
    ],
)
def test_the_former_default_of_dkd_beta_in_an_earlier_run_is_kept_where_it_is_read(
    tmp_path: Path, method: str, beta: float
) -> None:
    (tmp_path / "recipe.toml").write_text(f"[method]\n{method}\ndkd_beta = 8.0\n")
    (tmp_path / "facts.json").write_text("{}")
    assert read_recipe(tmp_path / "recipe.toml").method.dkd_beta == beta


@pytest.mark.parametrize(
    ("keys", "device", "processes", "recorded"),
    [
        ({}, "cuda", 1, True),
        ({}, "cpu", 1, False),
        ({}, "cuda", 2, False),
        ({"accumulate": 2}, "cuda", 1, False),
        ({"compile": True}, "cuda", 1, True),
        ({"cuda_graphs": False}, "cuda", 1, False),
        ({"cuda_graphs": True}, "cuda", 1, True),
    ],
)
def test_steps_are_recorded_by_default_wherever_that_can_be_done(
    keys: dict[str, object], device: str, processes: int, recorded: bool
) -> None:
    assert TrainRecipe(**keys).records_steps(device, processes) is recorded  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"accumulate": 2}, {"device": "cpu"}])
def test_cuda_graphs_do_not_go_with(other: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"train\.cuda_graphs = true.*train\.(accumulate|device).*Leave one"):
        TrainRecipe(cuda_graphs=True, **other)  # type: ignore[arg-type]

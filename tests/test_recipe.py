from __future__ import annotations

import dataclasses
import json
import string
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import (
    DataRecipe,
    MethodRecipe,
    Recipe,
    TeacherRecipe,
    TrainRecipe,
    parse_recipe,
    read_recipe,
)

REPO = Path(__file__).parents[1]
TOMLS = [REPO / "rkd_deploy" / "train" / "digits.toml", *sorted((REPO / "train").glob("**/*.toml"))]
TABLES = ("data", "teacher", "student", "method", "train")
KEYS = [f"{table}.{key}" for table in TABLES for key in typing.get_type_hints(typing.get_type_hints(Recipe)[table])]

LOSSES = ("kd", "fitnet", "at", "dkd", "reviewkd", "simkd")

# Every field with every value its rule allows; values of [method] may be of no use to each other.

texts = st.text(max_size=12)
channels = st.none() | st.tuples(*[st.floats(-10, 10)] * 3)
deviations = st.none() | st.tuples(*[st.floats(1e-6, 10)] * 3)
small = st.integers(1, 500)
optional = st.none() | small
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "data": {
        "name": st.sampled_from(["digits", "cifar10", "cifar100", "imagefolder", "imagenet", "webdataset"]),
        "root": texts,
        "test_root": st.none() | texts,
        "image_size": optional,
        "crop_fraction": st.none() | st.floats(0.1, 1),
        "train_limit": optional,
        "test_limit": optional,
        "val_fraction": st.floats(0, 0.5),
        "test_fraction": st.none() | st.floats(0.01, 0.9),
        "split_seed": st.none() | st.integers(0, 2**31 - 1),
        "augment": st.none() | st.sampled_from([(), ("crop",), ("flip", "crop"), ("resized_crop", "randaugment")]),
        "crop_padding": st.integers(0, 16),
        "randaugment_ops": st.integers(1, 16),
        "randaugment_magnitude": st.integers(0, 30),
        "mixup": st.floats(0, 100),
        "cutmix": st.floats(0, 100),
        "label_smoothing": st.floats(0, 0.9),
        "mean": channels,
        "std": deviations,
        "normalisation": st.just("data"),
        "cache": st.sampled_from(["auto", "memory", "off"]),
        "cache_gb": st.floats(0, 1e6),
        "workers": st.none() | st.integers(0, 256),
        "broken": st.sampled_from(["stop", "skip"]),
    },
    "teacher": {
        "name": texts,
        "checkpoint": st.none() | texts,
        "pretrained": st.just(False),
        "stages": st.none(),
        "epochs": optional,
        "lr": st.none() | st.floats(1e-9, 1e9),
        "mean": channels,
        "std": deviations,
    },
    "student": {
        "name": texts,
        "fraction": st.none(),  # with name = "teacher" only: test_a_fraction_of_the_teacher
        "checkpoint": st.none(),
        "weights": st.none() | st.just("fresh"),
        "pretrained": st.just(False),
        "stages": st.none(),
        "baseline": st.booleans(),
        "budget": st.just("latency"),
        "backend": st.none() | st.sampled_from(["onnxruntime", "openvino"]),
        "latency_batches": st.none() | st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
        "latency_threads": optional,
        "assistant_share": st.floats(0.01, 0.9),
        "assistants": st.integers(1, 16),
        "round_to": st.integers(1, 256),
    },
    "method": {
        "name": st.sampled_from(["residual", "cross_entropy", *LOSSES]),
        "scheme": st.sampled_from(["sequential", "progressive", "end_to_end"]),
        "head": st.sampled_from(["teacher", "trained", "finetuned"]),
        "distance": st.sampled_from(["mse", "normalised_mse", "smooth_l1", "cosine"]),
        "feature_weight": st.floats(1e-6, 1e300),
        "stages": st.sampled_from([(), (3,), (1, 2, 3)]),
        "stage_weight": st.floats(0, 1e300),
        "base": st.sampled_from(["none", *LOSSES]),
        "base_weight": st.none() | st.floats(1e-6, 1e300),
        "base_warmup_epochs": st.none() | st.integers(0, 500),
        "ce_weight": st.none() | st.floats(0, 1e300),
        "kl_weight": st.floats(0, 1e300),
        "assistant_weight": st.floats(0, 1e300),
        "step_decay": st.floats(0, 1),
        "detach": st.booleans(),
        "temperature": st.floats(0.01, 100),
        "standardise": st.booleans(),
        "dkd_alpha": st.floats(0, 100),
        "dkd_beta": st.floats(0, 100),
        "hint_stage": st.integers(1, 9),
        "simkd_factor": st.integers(1, 64),
    },
    "train": {
        "epochs": small,
        "assistant_epochs": optional,
        "head_epochs": optional,
        "batch_size": st.integers(1, 1000).map(lambda n: 6 * n),
        "accumulate": st.sampled_from([1, 2, 3]),
        "lr": st.floats(1e-9, 1e9),
        "momentum": st.floats(0.01, 0.9999),
        "nesterov": st.booleans(),
        "weight_decay": st.floats(0, 1e300),
        "clip_norm": st.none() | st.floats(1e-6, 1e300),
        "schedule": st.sampled_from(["cosine", "step", "constant"]),
        "warmup_epochs": st.floats(0, 1e300),
        "milestones": st.sets(st.integers(-5, 500)).map(lambda values: tuple(sorted(values))),
        "lr_decay": st.floats(0, 1),
        "ema_decay": st.floats(0, 0.9999),
        "ship": st.sampled_from(["last", "ema"]),
        "seed": st.integers(0, 2**31 - 1),
        "amp": st.booleans(),
        "channels_last": st.booleans(),
        "compile": st.booleans(),
        "cuda_graphs": st.just(False),  # does not go with others: test_cuda_graphs_do_not_go_with
        "sync_batchnorm": st.booleans(),
        "device": texts,
        "threads": optional,
        "checkpoint_minutes": st.floats(0, 1e300),
        "curves": st.booleans(),
        "tensorboard": st.none() | st.booleans(),
    },
}
METHODS = [
    {"name": "residual"},
    {"name": "residual", "base": "fitnet"},
    {"name": "residual", "scheme": "progressive", "base": "at"},
    {"name": "residual", "scheme": "end_to_end", "base": "dkd"},
    {"name": "residual", "scheme": "end_to_end", "base": "simkd"},
    {"name": "cross_entropy"},
    *({"name": name} for name in LOSSES),
]
USES = {
    "residual": {"scheme", "head", "distance", "feature_weight", "stages", "base"},
    "end_to_end": {"ce_weight", "kl_weight", "assistant_weight", "detach", "temperature"},
    "loss": {"base_weight", "base_warmup_epochs"},
    "baseline": {"ce_weight"},
    "kd": {"temperature", "standardise"},
    "dkd": {"temperature", "standardise", "dkd_alpha", "dkd_beta"},
    "fitnet": {"hint_stage"},
    "simkd": {"simkd_factor"},
}


def uses(method: dict[str, str]) -> set[str]:
    """The keys that a method reads, other than those that name it."""
    kinds = {method["name"], method.get("scheme"), method.get("base")}
    if method["name"] in LOSSES:
        kinds |= {"loss", "baseline"}
    if "base" in method:
        kinds |= {"loss"}
    never = method.keys() | ({"stages"} if "progressive" in kinds else set())
    return {key for kind in kinds for key in USES.get(str(kind), ())} - never


@st.composite
def methods(draw: st.DrawFn) -> MethodRecipe:
    chosen = draw(st.sampled_from(METHODS))
    keys = sorted(uses(chosen) - ({"scheme", "base"} & uses({"name": "residual"})))
    values = {key: draw(FIELDS["method"][key]) for key in keys}
    if values.get("ce_weight") == 0:
        values["ce_weight"] = 1.0
    return MethodRecipe(**{**values, **chosen})


@st.composite
def data(draw: st.DrawFn) -> DataRecipe:
    """Every key that the drawn set reads."""
    values = {key: draw(strategy) for key, strategy in FIELDS["data"].items()}
    name, files = values["name"], values["name"] in ("imagefolder", "imagenet", "webdataset")
    unread = set() if files else {"crop_fraction", "cache", "cache_gb", "workers", "broken"}
    unread |= {"image_size"} if "cifar" in name else set()
    unread |= set() if name == "webdataset" else {"test_root"}
    unread |= {"cache_gb"} if values["cache"] != "auto" else set()
    if name not in ("imagefolder", "webdataset") or (name == "webdataset" and values["test_root"] is not None):
        unread |= {"test_fraction", "split_seed"}
    if "randaugment" not in (values["augment"] or ()):
        unread |= {"randaugment_ops", "randaugment_magnitude"}
    return DataRecipe(**{key: value for key, value in values.items() if key not in unread})


names = st.text(min_size=1, max_size=12).filter(lambda name: not set(name) & set("/\\\0"))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    tables: dict[str, Any] = {
        table: draw(st.builds(typing.get_type_hints(Recipe)[table], **fields))
        for table, fields in FIELDS.items()
        if table not in ("data", "method")
    }
    tables["data"] = draw(data())
    method = draw(methods())
    if method.loss == "dkd":
        tables["data"] = dataclasses.replace(tables["data"], mixup=0.0, cutmix=0.0)
    if not method.residual:
        changes: dict[str, Any] = {"checkpoint": None, "baseline": True, "assistants": 1}
        tables["student"] = dataclasses.replace(tables["student"], **changes)
    elif method.scheme == "end_to_end" and tables["student"].assistants > 1:
        method = dataclasses.replace(method, step_decay=draw(FIELDS["method"]["step_decay"]))
    elif method.scheme == "progressive":  # reads neither latency nor inherited weights
        keys = ("backend", "latency_batches", "latency_threads")
        fresh = dict.fromkeys(keys) | {"budget": "params", "weights": "fresh"}
        tables["student"] = dataclasses.replace(tables["student"], **fresh)
    return Recipe(name=draw(names), method=method, **tables)


def test_every_key_is_drawn_here() -> None:
    """A key that is added and not written would pass the round trip at its default."""
    assert [f"{table}.{key}" for table, fields in FIELDS.items() for key in fields] == KEYS


@given(recipes())
def test_toml_gives_the_equal_recipe_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    "character", [chr(code) for code in (*range(0x20), 0x7F, 0x85, 0x2028, 0xFEFF, 0x1F600, 34, 92)]
)
def test_characters_that_toml_wants_escaped_come_back(tmp_path: Path, character: str) -> None:
    recipe = Recipe(data=DataRecipe(root=f"a{character}b"))
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.toml") == recipe


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
        ("data.root=/some/where=odd dir", "data", "root", "/some/where=odd dir"),
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


@pytest.mark.parametrize("override", ["train.epochs", "epochs=5", "=5", "", "train", "train=5"])
def test_set_of_another_form_is_refused_with_an_example(override: str) -> None:
    with pytest.raises(RecipeError, match=r"is not of the form table\.key=value, e\.g\. --set train\.epochs=5"):
        read_recipe(None, [override])


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


OF_EACH_TYPE: dict[str, Any] = {
    "bool": True,
    "int": 1,
    "float": 1.5,
    "str": "text",
    "table": {"a": 1},
    "bools": [True],
    "ints": [1],
    "floats": [1.5],
    "strs": ["text"],
}
FITTING = {
    bool: {"bool"},
    int: {"int"},
    float: {"int", "float"},
    str: {"str"},
    tuple[str, ...]: {"strs"},
    tuple[int, ...]: {"ints"},
    tuple[float, ...]: {"ints", "floats"},
}


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_wrong_type_is_refused(key: str) -> None:
    table, name = key.split(".")
    hint = typing.get_type_hints(typing.get_type_hints(Recipe)[table])[name]
    if isinstance(hint, types.UnionType):
        (hint,) = (item for item in typing.get_args(hint) if item is not types.NoneType)
    for kind in OF_EACH_TYPE.keys() - FITTING[hint]:
        with pytest.raises(RecipeError, match=rf"^{key} = .* must be (of type \w+\.|a list, e\.g\. {name} = )"):
            parse_recipe({table: {name: OF_EACH_TYPE[kind]}})


@pytest.mark.parametrize("key", ["train.epochs", "train.lr", "train.seed", "data.val_fraction", "student.round_to"])
def test_true_is_not_one(key: str) -> None:
    table, name = key.split(".")
    with pytest.raises(RecipeError, match=rf"{key} = True must be of type (int|float)"):
        parse_recipe({table: {name: True}})


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        (
            "data.name",
            ["mnist", ""],
            "Unknown value of data.name .*Choices: cifar10, cifar100, digits, imagefolder, imagenet",
        ),
        (
            "data.augment",
            [["crop", "rotate"]],
            "Unknown value of data.augment 'rotate'.*Choices: crop, flip, randaugment, resized_crop",
        ),
        ("data.normalisation", ["mine"], "Choices: data, teacher"),
        ("data.cache", ["disk"], "Choices: auto, memory, off"),
        ("data.broken", ["mend"], "Choices: skip, stop"),
        ("data.crop_fraction", [0.0, 1.5], "must be between 0.1 and 1"),
        ("data.test_fraction", [0.0, 1.0], "must be between 0.01 and 0.9"),
        ("data.split_seed", [-1], "must be between 0 and"),
        ("data.workers", [-1, 300], "must be between 0 and 256"),
        ("data.randaugment_ops", [0], "must be between 1 and 16"),
        ("data.randaugment_magnitude", [31], "must be between 0 and 30"),
        ("data.mixup", [-0.1, float("nan")], "must be between 0 and 100"),
        ("data.cutmix", [-1.0], "must be between 0 and 100"),
        ("data.label_smoothing", [0.91], "must be between 0 and 0.9"),
        ("data.cache_gb", [-1.0], "must be at least 0"),
        ("data.val_fraction", [-0.1, 0.51, float("nan")], "must be between 0 and 0.5"),
        ("data.crop_padding", [-1, 17], "must be between 0 and 16"),
        ("data.train_limit", [0, -5], "must be at least 1"),
        ("data.test_limit", [0], "must be at least 1"),
        ("data.image_size", [0], "must be at least 1"),
        ("data.mean", [[0.5], [0.5] * 4, []], r"has \d values; there are 3 channels \(RGB\)"),
        ("data.mean", [[0.5, 0.5, float("nan")], [0.5, 0.5, float("inf")]], "must be finite"),
        ("data.std", [[0.5]], "has 1 values; there are 3 channels"),
        ("data.std", [[0.5, 0.0, 0.5], [0.5, 0.5, -1.0]], "must be positive"),
        ("data.std", [[0.5, float("nan"), 0.5]], "must be finite"),
        ("teacher.epochs", [0], "must be at least 1"),
        ("teacher.mean", [[0.5, 0.5]], "has 2 values; there are 3 channels"),
        ("teacher.std", [[0.0, 0.5, 0.5]], "must be positive"),
        ("student.budget", ["flops"], "Unknown value of student.budget 'flops'.*Choices: latency, macs, params"),
        ("student.assistant_share", [0.0, 0.91, float("nan")], "must be between 0.01 and 0.9"),
        ("student.round_to", [0, 257], "must be between 1 and 256"),
        ("student.assistants", [0, 17], "must be between 1 and 16"),
        ("method.name", ["rkd"], "Choices: at, cross_entropy, dkd, fitnet, kd, residual, reviewkd, simkd"),
        ("method.scheme", ["parallel"], "Choices: end_to_end, progressive, sequential"),
        ("method.head", ["student"], "Choices: finetuned, teacher, trained"),
        ("method.distance", ["l2"], "Choices: cosine, mse, normalised_mse, smooth_l1"),
        ("method.base", ["crd"], "Choices: at, dkd, fitnet, kd, none, reviewkd, simkd"),
        ("method.base_weight", [0.0, -1.0, float("inf")], "must be (at least 1e-09|finite)"),
        ("method.base_warmup_epochs", [-1], "must be at least 0"),
        ("method.ce_weight", [-0.1, float("nan")], "must be (at least 0|finite)"),
        ("method.kl_weight", [-0.1], "must be at least 0"),
        ("method.assistant_weight", [-0.1], "must be at least 0"),
        ("method.stage_weight", [-0.1], "must be at least 0"),
        ("method.stages", [[2, 1], [1, 1], [0, 3]], "must rise, from 1 on"),
        ("method.step_decay", [-0.1, 1.1], "must be between 0 and 1"),
        ("method.temperature", [0.0, -1.0], "must be at least 0.001"),
        ("method.dkd_alpha", [-0.1], "must be at least 0"),
        ("method.dkd_beta", [-0.1], "must be at least 0"),
        ("method.hint_stage", [0], "must be at least 1"),
        ("method.simkd_factor", [0], "must be at least 1"),
        ("method.feature_weight", [0.0, -1.0], "must be at least 1e-06"),
        ("method.feature_weight", [float("inf"), float("nan")], "must be finite"),
        ("teacher.lr", [0.0, float("inf")], "must be (at least 1e-09|finite)"),
        ("train.epochs", [0, -1], "must be at least 1"),
        ("train.assistant_epochs", [0], "must be at least 1"),
        ("train.head_epochs", [0], "must be at least 1"),
        ("train.threads", [0], "must be at least 1"),
        ("train.batch_size", [0, 1], "must be at least 2"),
        ("train.lr", [0.0, -0.1], "must be at least 1e-09"),
        ("train.lr", [float("inf"), float("nan")], "must be finite"),
        ("train.momentum", [-0.1, 1.0], "must be between 0 and 0.9999"),
        ("train.weight_decay", [-1e-4], "must be at least 0"),
        ("train.warmup_epochs", [-1.0], "must be at least 0"),
        ("train.lr_decay", [-0.1, 1.1, float("nan")], "must be between 0 and 1"),
        ("train.schedule", ["linear"], "Choices: constant, cosine, step"),
        ("train.seed", [-1, 2**31], "must be between 0 and 2147483647"),
        ("train.milestones", [[2, 1], [1, 1]], "must rise"),
    ],
)
def test_a_value_outside_its_rule_is_refused(key: str, values: list[Any], rule: str) -> None:
    table, name = key.split(".")
    for value in values:
        with pytest.raises(RecipeError, match=rule) as caught:
            parse_recipe({table: {name: value}})
        assert key in str(caught.value)


def test_the_ends_of_a_range_belong_to_it() -> None:
    recipe = parse_recipe({"data": {"val_fraction": 0.5, "crop_padding": 16}, "train": {"batch_size": 2, "seed": 0}})
    assert (recipe.data.val_fraction, recipe.data.crop_padding, recipe.train.batch_size) == (0.5, 16, 2)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(RecipeError, match=r"train\.nesterov = true needs train\.momentum above 0"):
        parse_recipe({"train": {"nesterov": True, "momentum": 0.0}})


# Settings that nothing reads


OTHERS = {
    "scheme": "end_to_end",
    "head": "trained",
    "distance": "cosine",
    "feature_weight": 3.0,
    "stages": (1, 3),
    "stage_weight": 2.0,
    "base": "kd",
    "base_weight": 2.0,
    "base_warmup_epochs": 3,
    "ce_weight": 0.5,
    "kl_weight": 2.0,
    "assistant_weight": 2.0,
    "detach": False,
    "temperature": 2.0,
    "standardise": True,
    "dkd_alpha": 2.0,
    "dkd_beta": 2.0,
    "hint_stage": 1,
    "simkd_factor": 4,
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(method.values()))
@pytest.mark.parametrize("key", OTHERS)
def test_a_setting_is_read_or_refused(method: dict[str, str], key: str) -> None:
    """The table of what reads what, written a second time."""
    if key in method:
        return
    if key in uses(method):
        assert getattr(parse_recipe({"method": {**method, key: OTHERS[key]}}).method, key) == OTHERS[key]
        return
    default = getattr(MethodRecipe(), key)
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"method": {**method, key: OTHERS[key]}})
    message = str(caught.value)
    assert message.startswith(f"method.{key} = ")
    assert f'has no effect with method.name = "{method["name"]}"' in message
    assert "it is read only " in message
    assert "Leave it out" in message
    if default is not None:  # the way out for a key that stands in a file
        word = json.dumps(default)
        assert f"--set method.{key}={word}" in message
        assert read_recipe(None, [f"method.{key}={word}"]).method == MethodRecipe()


def test_stages_are_weighed_where_there_are_several() -> None:
    assert read_recipe(None, ["method.stages=[2, 3]", "method.stage_weight=0.5"]).method.stage_weight == 0.5
    with pytest.raises(RecipeError, match=r"method\.stage_weight = 0\.5 has no effect .*two stages or more"):
        read_recipe(None, ["method.stages=[3]", "method.stage_weight=0.5"])


def test_steps_are_weighed_in_chains_only() -> None:
    chain = ["method.scheme=end_to_end", "method.step_decay=0.9"]
    assert read_recipe(None, [*chain, "student.assistants=2"]).method.step_decay == 0.9
    with pytest.raises(RecipeError, match=r"method\.step_decay = 0\.9 .*set student\.assistants above 1"):
        read_recipe(None, chain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=kd", "student.checkpoint=s.pth"], r"student\.checkpoint = 's\.pth' gives it trained"),
        (["method.name=kd", "student.baseline=false"], r"student\.baseline = false leaves it out"),
        (["method.name=at", "student.assistants=2"], r"student\.assistants = 2.*method\.name = \"residual\""),
        (["method.name=at", "method.ce_weight=0"], r"method\.ce_weight = 0 leaves nothing that trains the classifier"),
        (
            ["method.scheme=end_to_end", "method.head=trained", "method.ce_weight=0", "method.kl_weight=0"],
            r"leave nothing that trains a trained head.*method\.head = \"teacher\"",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(None, overrides)


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


# What belongs together in [data]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "cifar10", "image_size": 32}, r'data\.image_size = 32 has no effect with data\.name = "cifar10"'),
        ({"crop_fraction": 0.9}, r'crop_fraction = 0\.9 has no effect .*"imagefolder", "imagenet" or "webdataset"'),
        ({"workers": 2}, "data.workers = 2 has no effect"),
        ({"broken": "skip"}, 'data.broken = "skip" has no effect'),
        ({"cache": "off"}, 'data.cache = "off" has no effect'),
        (
            {"name": "imagefolder", "root": "r", "cache": "off", "cache_gb": 1.0},
            'cache_gb = 1.0 .* data.cache = "auto"',
        ),
        ({"name": "imagefolder", "root": "r", "test_root": "t"}, 'test_root = "t" has no effect.*"webdataset"'),
        ({"name": "webdataset", "root": "r", "test_root": "t", "split_seed": 1}, "split_seed = 1 .*and data.test_root"),
        ({"name": "imagenet", "root": "r", "test_fraction": 0.5}, "data.test_fraction = 0.5 has no effect"),
        ({"randaugment_magnitude": 5}, r'randaugment_magnitude = 5 has no effect.*"randaugment" in data\.augment'),
        ({"augment": ("crop", "resized_crop")}, "crop and resized_crop both choose the window. Keep one"),
        ({"name": "imagefolder"}, r"needs data.root, where the images are: --set data\.root=FOLDER"),
        ({"normalisation": "teacher", "mean": (0.5,) * 3}, "go before data.normalisation"),
    ],
)
def test_data_keys_that_nothing_reads_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DataRecipe(**keys)


def test_files_are_cropped_by_area_and_others_by_padding_by_default() -> None:
    assert DataRecipe().augmentations == DataRecipe(name="cifar10").augmentations == ("crop", "flip")
    assert DataRecipe(name="imagenet", root="r").augmentations == ("resized_crop", "flip")
    assert DataRecipe(name="imagefolder", root="r", augment=()).augmentations == ()


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_mixed_labels_are_refused_where_a_loss_needs_one_class(key: str) -> None:
    mixed = DataRecipe(**{key: 0.2})
    for method in (MethodRecipe(name="dkd"), MethodRecipe(base="dkd")):
        with pytest.raises(RecipeError, match=rf"data\.{key} = 0\.2.* mix labels, and dkd needs one class"):
            Recipe(data=mixed, method=method)
    Recipe(data=mixed, method=MethodRecipe(name="kd"))
    Recipe(data=DataRecipe(label_smoothing=0.1), method=MethodRecipe(name="dkd"))


def test_the_teachers_normalisation_must_be_stated_somewhere() -> None:
    asked = DataRecipe(normalisation="teacher")
    with pytest.raises(RecipeError, match=r'data\.normalisation = "teacher", and nothing states that of T'):
        Recipe(data=asked)
    Recipe(data=asked, teacher=TeacherRecipe(mean=(0.5,) * 3, std=(0.5,) * 3))
    Recipe(data=asked, teacher=TeacherRecipe(checkpoint="t.safetensors"))


def test_a_fraction_of_the_teacher() -> None:
    recipe = read_recipe(None, ["student.name=teacher", "student.fraction=0.5"])
    assert (recipe.student.fraction, recipe.student.inherits) == (0.5, True)
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe
    for wrong in (
        ["student.fraction=0.5"],
        ["student.name=teacher"],
        ["student.name=teacher", "student.fraction=0.5", "student.checkpoint=x"],
        ["student.weights=inherited"],
        ["student.backend=onnxruntime"],
        ["student.budget=latency", "student.backend=pytorch"],
        ["student.budget=latency", "student.latency_batches=[0]"],
    ):
        with pytest.raises(RecipeError, match="student"):
            read_recipe(None, wrong)

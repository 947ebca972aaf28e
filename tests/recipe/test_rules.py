"""Values that a recipe refuses: wrong type, out of range, at odds, read by nothing."""

from __future__ import annotations

import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import (
    DataRecipe,
    MethodRecipe,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
    TrainRecipe,
    parse_recipe,
    read_recipe,
)

TABLES = ("data", "teacher", "student", "method", "train")
KEYS = [f"{table}.{key}" for table in TABLES for key in typing.get_type_hints(typing.get_type_hints(Recipe)[table])]


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


def _hint(key: str) -> Any:
    table, name = key.split(".")
    hint = typing.get_type_hints(typing.get_type_hints(Recipe)[table])[name]
    if isinstance(hint, types.UnionType):
        (hint,) = (item for item in typing.get_args(hint) if item is not types.NoneType)
    return hint


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_wrong_type_is_refused(key: str) -> None:
    table, name = key.split(".")
    for kind in OF_EACH_TYPE.keys() - FITTING[_hint(key)]:
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
        ("data.normalisation", ["mine"], "Choices: data, imagenet, teacher"),
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
        ("data.cache_gb", [-1.0], "must be between 0 and 1000000"),
        ("data.val_fraction", [-0.1, 0.51, float("nan")], "must be between 0 and 0.5"),
        ("data.crop_padding", [-1, 17], "must be between 0 and 16"),
        ("data.train_limit", [0, -5], "must be between 1 and"),
        ("data.test_limit", [0], "must be between 1 and"),
        ("data.image_size", [0], "must be between 1 and"),
        ("data.mean", [[0.5], [0.5] * 4, []], r"has \d values; there are 3 channels \(RGB\)"),
        ("data.mean", [[0.5, 0.5, float("nan")], [0.5, 0.5, float("inf")]], "must be between -1000000.0 and 1000000.0"),
        ("data.std", [[0.5]], "has 1 values; there are 3 channels"),
        ("data.std", [[0.5, 0.0, 0.5], [0.5, 0.5, -1.0]], "must be between 1e-06 and 1000000"),
        ("data.std", [[0.5, float("nan"), 0.5]], "must be between 1e-06 and"),
        ("teacher.epochs", [0], "must be between 1 and"),
        ("teacher.mean", [[0.5, 0.5]], "has 2 values; there are 3 channels"),
        ("teacher.std", [[0.0, 0.5, 0.5]], "must be between 1e-06 and"),
        ("student.budget", ["flops"], "Unknown value of student.budget 'flops'.*Choices: latency, macs, params"),
        ("student.layout", ["stacked"], "Choices: branches, side_by_side"),
        ("student.assistant_share", [0.0, 0.91, float("nan")], "must be between 0.01 and 0.9"),
        ("student.round_to", [0, 257], "must be between 1 and 256"),
        ("student.assistants", [0, 17], "must be between 1 and 16"),
        ("method.name", ["rkd"], "Choices: at, cross_entropy, dkd, fitnet, kd, residual, reviewkd, simkd"),
        ("method.scheme", ["parallel"], "Choices: end_to_end, progressive, sequential"),
        ("method.head", ["student"], "Choices: finetuned, teacher, trained"),
        ("method.distance", ["l2"], "Choices: cosine, mse, normalised_mse, relative, smooth_l1"),
        ("method.base", ["crd"], "Choices: at, dkd, fitnet, kd, none, reviewkd, simkd"),
        ("method.base_weight", [0.0, -1.0, float("inf")], "must be between 1e-09 and 1000000"),
        ("method.base_warmup_epochs", [-1], "must be between 0 and 1000000"),
        ("method.ce_weight", [-0.1, float("nan")], "must be between 0 and 1000000"),
        ("method.student_weight", [-0.1], "must be between 0 and 1000000"),
        ("method.assistant_weight", [-0.1], "must be between 0 and 1000000"),
        ("method.stage_weight", [-0.1], "must be between 0 and 1000000"),
        ("method.stages", [[2, 1], [1, 1]], "must rise"),
        ("method.stages", [[0, 3]], "must be between 1 and 1000000"),
        ("method.step_decay", [-0.1, 1.1], "must be between 0 and 1"),
        ("method.temperature", [0.0, -1.0], "must be between 0.001 and 1000000"),
        ("method.dkd_alpha", [-0.1], "must be between 0 and 1000000"),
        ("method.dkd_beta", [-0.1], "must be between 0 and 1000000"),
        ("method.hint_stage", [0], "must be between 1 and"),
        ("method.simkd_factor", [0], "must be between 1 and"),
        ("method.feature_weight", [0.0, -1.0], "must be between 1e-06 and 1000000"),
        ("method.feature_weight", [float("inf"), float("nan")], "must be between 1e-0. and 1000000"),
        ("teacher.lr", [0.0, float("inf")], "must be between 1e-09 and 1000000"),
        ("train.epochs", [0, -1], "must be between 1 and"),
        ("train.assistant_epochs", [0], "must be between 1 and"),
        ("train.head_epochs", [0], "must be between 1 and"),
        ("train.threads", [0], "must be between 1 and"),
        ("train.batch_size", [0, 1], "must be between 2 and 1000000"),
        ("train.lr", [0.0, -0.1], "must be between 1e-09 and 1000000"),
        ("train.lr", [float("inf"), float("nan")], "must be between 1e-0. and 1000000"),
        ("train.momentum", [-0.1, 1.0], "must be between 0 and 0.9999"),
        ("train.weight_decay", [-1e-4], "must be between 0 and 1000000"),
        ("train.warmup_epochs", [-1.0], "must be between 0 and 1000000"),
        ("train.lr_decay", [-0.1, 1.1, float("nan")], "must be between 0 and 1"),
        ("train.schedule", ["linear"], "Choices: constant, cosine, step"),
        ("train.seed", [-1, 2**31], "must be between 0 and 2147483647"),
        ("train.milestones", [[2, 1], [1, 1]], "must rise"),
        ("train.milestones", [[-5, 3], [0]], "must be between 1 and 1000000"),
    ],
)
def test_a_value_outside_its_rule_is_refused(key: str, values: list[Any], rule: str) -> None:
    table, name = key.split(".")
    for value in values:
        with pytest.raises(RecipeError, match=rule) as caught:
            parse_recipe({table: {name: value}})
        assert key in str(caught.value)


NUMBERS = [key for key in KEYS if FITTING[_hint(key)] & {"int", "float", "ints", "floats"}]


@pytest.mark.parametrize("number", ["1" * 400, f"-{'1' * 400}", "inf", "-inf", "nan", "1e400", str(2**63)])
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_held_to_a_range_that_the_message_names(key: str, number: str) -> None:
    """One rule for --set, TOML and calls; a list is judged number by number. Whole numbers have no inf and no nan."""
    several = typing.get_origin(_hint(key)) is tuple
    value = f"[{', '.join([number] * 3)}]" if several else number
    rule = rf"^{key} = .*(between .* and \S+\.$|must be of type int)"
    with pytest.raises(RecipeError, match=rule) as caught:
        read_recipe(None, [f"{key}={value}"])
    assert len(str(caught.value)) < 200
    table, name = key.split(".")
    parsed = tomllib.loads(f"x = {value}")["x"]
    with pytest.raises(RecipeError, match=rule):
        parse_recipe({table: {name: parsed}})
    owner = typing.get_type_hints(Recipe)[table]
    with pytest.raises(RecipeError, match=rule):
        owner(**{name: tuple(parsed) if several else parsed})


def test_a_whole_number_of_5000_digits_is_one_error_everywhere(tmp_path: Path) -> None:
    digits = "1" * 5000
    for overrides in ([f"train.epochs={digits}"], [f"train.milestones=[{digits}]"], [f"data.mean=[{digits}]"]):
        with pytest.raises(RecipeError, match="digits"):
            read_recipe(None, overrides)
    (tmp_path / "r.toml").write_text(f"[train]\nepochs = {digits}\n")
    with pytest.raises(RecipeError, match="digits"):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=r"train\.epochs = a int too large to show must be between 1 and 1000000"):
        TrainRecipe(epochs=10**5000)


def test_a_call_is_held_to_the_types_of_toml() -> None:
    for wrong in ({"epochs": "5"}, {"epochs": 5.0}, {"lr": True}, {"schedule": 3}, {"milestones": 5}, {"amp": 1}):
        (name,) = wrong
        with pytest.raises(RecipeError, match=rf"^train\.{name} = .* must be (of type|a list)"):
            TrainRecipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"^train = \{'epochs': 5\} must be a TrainRecipe"):
        Recipe(train={"epochs": 5})  # type: ignore[arg-type]


def test_numbers_and_lists_of_other_libraries_become_toml_s() -> None:
    train = TrainRecipe(epochs=np.int64(5), lr=np.float32(0.5), milestones=[np.int32(2), 3])  # type: ignore[arg-type]
    assert train == TrainRecipe(epochs=5, lr=0.5, milestones=(2, 3))
    assert [type(value) for value in (train.epochs, train.lr, *train.milestones)] == [int, float, int, int]
    recipe = Recipe(train=train)
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": {"root": "x" * 5000}}, r"data\.root has 5,000 bytes, and at most 4,096 are read"),
        ({"data": {"root": "\udcff"}}, r"data\.root = '\\udcff' is no UTF-8 text"),
        ({"data": {"augment": ["flip"] * 5000}}, r"data\.augment has 5,000 values, and at most 1,000 are read"),
        ({"name": "a\nb"}, r"name = 'a\\nb' .*must be printable"),
        ({"name": "\x1b[31m"}, r"name = '\\x1b\[31m' .*must be printable"),
        ({"name": "n" * 201}, r"at most 200 bytes long"),
        ({"name": "\udcff"}, "is no UTF-8 text"),
    ],
)
def test_texts_that_no_recipe_can_hold(content: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        parse_recipe(content)
    assert len(str(caught.value)) < 250


def test_the_ends_of_a_range_belong_to_it() -> None:
    recipe = parse_recipe({"data": {"val_fraction": 0.5, "crop_padding": 16}, "train": {"batch_size": 2, "seed": 0}})
    assert (recipe.data.val_fraction, recipe.data.crop_padding, recipe.train.batch_size) == (0.5, 16, 2)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(RecipeError, match=r"train\.nesterov = true needs train\.momentum above 0"):
        parse_recipe({"train": {"nesterov": True, "momentum": 0.0}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=kd", "student.checkpoint=s.pth"], r"student\.checkpoint = 's\.pth' gives it trained"),
        (["method.name=kd", "student.baseline=false"], r"student\.baseline = false leaves it out"),
        (
            ["method.name=at", "student.layout=side_by_side"],
            r"without assistants, and student\.layout = 'side_by_side'",
        ),
        (
            ["method.scheme=progressive", "student.layout=side_by_side"],
            r'layout = "side_by_side", and.* cannot be merged',
        ),
        (["method.name=at", "student.assistants=2"], r"student\.assistants = 2.*method\.name = \"residual\""),
        (["method.name=at", "method.ce_weight=0"], r"method\.ce_weight = 0 leaves nothing that trains the classifier"),
        (
            ["method.scheme=end_to_end", "method.base=at", "method.ce_weight=0"],
            r"leave nothing that trains a finetuned head.*method\.head = \"teacher\"",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(None, overrides)


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
    teachers = DataRecipe(normalisation="teacher")
    with pytest.raises(RecipeError, match=r'data\.normalisation = "teacher", and nothing states that of T'):
        Recipe(data=teachers)
    Recipe(data=teachers, teacher=TeacherRecipe(mean=(0.5,) * 3, std=(0.5,) * 3))
    Recipe(data=teachers, teacher=TeacherRecipe(checkpoint="t.safetensors"))


def test_a_fraction_of_the_teacher() -> None:
    recipe = read_recipe(None, ["student.name=teacher", "student.fraction=0.5"])
    assert (recipe.student.fraction, recipe.student.inherits) == (0.5, True)
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe
    for wrong, message in (
        (["student.fraction=0.5"], r'student\.fraction = 0\.5 has no effect .* only with student\.name = "teacher"'),
        (["student.name=teacher"], r"nothing says to what\. Set student\.fraction"),
        (["student.name=teacher", "student.fraction=1.5"], r"student\.fraction = 1\.5 must be between 0\.01 and 1"),
        (
            ["student.name=teacher", "student.fraction=0.5", "student.checkpoint=x"],
            r"student\.checkpoint = 'x' is about an S0 of its own",
        ),
        (["student.weights=inherited"], "needs a trained network to inherit from"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_recipe(None, wrong)


@pytest.mark.parametrize(("key", "value"), [("backend", "openvino"), ("latency_batches", (2,)), ("latency_threads", 1)])
def test_keys_of_a_measurement_are_read_where_one_is_made(key: str, value: Any) -> None:
    assert getattr(StudentRecipe(budget="latency", **{key: value}), key) == value
    with pytest.raises(RecipeError, match=rf'student\.{key} = .* only with student\.budget = "latency"\. Leave it out'):
        StudentRecipe(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "backend",
            "pytorch",
            "Unknown value of student.backend 'pytorch'.*Choices: onnxruntime, .*graphs, openvino",
        ),
        ("latency_batches", (8, 0), r"student\.latency_batches = 0 must be between 1 and"),
        ("latency_batches", (), r"student\.latency_batches = \[\] names no batch size"),
        ("latency_threads", 0, r"student\.latency_threads = 0 must be between 1 and"),
    ],
)
def test_values_of_a_measurement_that_cannot_be_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StudentRecipe(budget="latency", **{key: value})


@pytest.mark.parametrize("owner", [TeacherRecipe, StudentRecipe])
@pytest.mark.parametrize("key", ["checkpoint_key", "labels"])
def test_keys_of_a_file_that_is_not_named(owner: type[TeacherRecipe | StudentRecipe], key: str) -> None:
    names = ({}, {"name": "teacher", "fraction": 0.5}) if owner is StudentRecipe else ({},)
    for name in names:
        with pytest.raises(RecipeError, match=rf'{key} = "x" has no effect .* only with \w+\.checkpoint, the file'):
            owner(**{key: "x"}, **name)
    assert getattr(owner(**{key: "x", "checkpoint": "c.pth"}), key) == "x"

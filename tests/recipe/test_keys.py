"""Every key of a recipe: written, read back, and read or refused by the method beside it."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe import DataRecipe, MethodRecipe, Recipe, parse_recipe, read_recipe

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
        "image_size": st.none() | st.integers(1, 256),
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
        "normalisation": st.sampled_from([None, "data"]),
        "cache": st.sampled_from(["auto", "memory", "off"]),
        "cache_gb": st.floats(0, 1e6),
        "workers": st.none() | st.integers(0, 256),
        "broken": st.sampled_from(["stop", "skip"]),
    },
    "teacher": {
        "name": texts,
        "checkpoint": st.none() | texts,
        "checkpoint_key": st.none(),  # with a checkpoint only, as labels: test_keys_of_a_file_that_is_not_named
        "labels": st.none(),
        "pretrained": st.just(False),
        "stages": st.none(),
        "epochs": optional,
        "lr": st.none() | st.floats(1e-9, 1e6),
        "mean": channels,
        "std": deviations,
    },
    "student": {
        "name": texts,
        "fraction": st.none(),  # with name = "teacher" only: test_a_fraction_of_the_teacher
        "checkpoint": st.none(),
        "checkpoint_key": st.none(),
        "labels": st.none(),
        "weights": st.none() | st.just("fresh"),
        "pretrained": st.just(False),
        "stages": st.none(),
        "baseline": st.booleans(),
        "control": st.booleans(),
        "budget": st.just("latency"),
        "layout": st.none() | st.sampled_from(["branches", "side_by_side"]),
        "shared_stages": st.none(),  # with layout = "trunk" only
        "backend": st.none() | st.sampled_from(["onnxruntime", "onnxruntime:cuda-graphs", "openvino"]),
        "latency_device": st.none() | st.sampled_from(["cpu", "cuda", "cuda:1"]),
        "latency_batches": st.none() | st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
        "latency_threads": optional,
        "assistant_share": st.floats(0.01, 0.9),
        "assistants": st.integers(1, 16),
        "round_to": st.integers(1, 256),
    },
    "method": {
        "name": st.sampled_from(["residual", "cross_entropy", *LOSSES]),
        "scheme": st.sampled_from(["sequential", "progressive", "end_to_end"]),
        "head": st.none() | st.sampled_from(["teacher", "trained", "finetuned"]),
        "distance": st.sampled_from(["relative", "mse", "normalised_mse", "smooth_l1", "cosine"]),
        "feature_weight": st.floats(1e-6, 1e6),
        "stages": st.sampled_from([(), (3,), (1, 2, 3)]),
        "stage_weight": st.floats(0, 1e6),
        "base": st.none() | st.sampled_from(["none", *LOSSES]),
        "base_weight": st.none() | st.floats(1e-6, 1e6),
        "base_warmup_epochs": st.none() | st.integers(0, 500),
        "ce_weight": st.none() | st.floats(0, 1e6),
        "student_weight": st.floats(0, 1e6),
        "assistant_weight": st.floats(0, 1e6),
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
        "lr": st.floats(1e-9, 1e6),
        "momentum": st.floats(0.01, 0.9999),
        "nesterov": st.booleans(),
        "weight_decay": st.floats(0, 1e6),
        "clip_norm": st.none() | st.floats(1e-6, 1e6),
        "schedule": st.sampled_from(["cosine", "step", "constant"]),
        "warmup_epochs": st.floats(0, 1e6),
        "milestones": st.sets(st.integers(1, 500)).map(lambda values: tuple(sorted(values))),
        "lr_decay": st.floats(0, 1),
        "ema_decay": st.floats(0, 0.9999),
        "ship": st.sampled_from(["last", "ema"]),
        "seed": st.integers(0, 2**31 - 1),
        "amp": st.booleans(),
        "channels_last": st.booleans(),
        "compile": st.booleans(),
        "cuda_graphs": st.none() | st.just(False),  # does not go with others: test_cuda_graphs_do_not_go_with
        "sync_batchnorm": st.booleans(),
        "device": texts,
        "threads": optional,
        "checkpoint_minutes": st.floats(0, 1e6),
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
    "end_to_end": {"ce_weight", "student_weight", "assistant_weight", "detach"},
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
    unread |= {"image_size"} if "cifar" in name else {"root"} if name == "digits" else set()
    unread |= set() if name == "webdataset" else {"test_root"}
    unread |= {"cache_gb"} if values["cache"] != "auto" else set()
    if name not in ("imagefolder", "webdataset") or (name == "webdataset" and values["test_root"] is not None):
        unread |= {"test_fraction"} | ({"split_seed"} if values["test_limit"] is None else set())
    if "randaugment" not in (values["augment"] or ()):
        unread |= {"randaugment_ops", "randaugment_magnitude"}
    return DataRecipe(**{key: value for key, value in values.items() if key not in unread})


names = st.text(min_size=1, max_size=12).filter(lambda name: name.isprintable() and not set(name) & set("/\\"))


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
        changes: dict[str, Any] = {"checkpoint": None, "baseline": True, "assistants": 1, "layout": None}
        tables["student"] = dataclasses.replace(tables["student"], **changes)
    elif method.scheme == "end_to_end" and tables["student"].assistants > 1:
        method = dataclasses.replace(method, step_decay=draw(FIELDS["method"]["step_decay"]))
    elif method.scheme == "progressive":  # reads neither latency nor inherited weights
        keys = ("layout", "backend", "latency_batches", "latency_threads", "latency_device")
        fresh = dict.fromkeys(keys) | {"budget": "params", "weights": "fresh"}
        tables["student"] = dataclasses.replace(tables["student"], **fresh)
    return Recipe(name=draw(names), method=method, **tables)


def test_every_key_is_drawn_here() -> None:
    """A key that is added and not written would pass the round trip at its default."""
    tables = typing.get_type_hints(Recipe)
    assert {table: list(fields) for table, fields in FIELDS.items()} == {
        table: list(typing.get_type_hints(tables[table])) for table in ("data", "teacher", "student", "method", "train")
    }


@given(recipes())
def test_toml_gives_the_equal_recipe_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    "character", [chr(code) for code in (*range(0x20), 0x7F, 0x85, 0x2028, 0xFEFF, 0x1F600, 34, 92)]
)
def test_characters_that_toml_wants_escaped_come_back(tmp_path: Path, character: str) -> None:
    recipe = Recipe(data=DataRecipe(name="cifar10", root=f"a{character}b"))
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.toml") == recipe


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
    "student_weight": 2.0,
    "assistant_weight": 2.0,
    "detach": False,
    "temperature": 2.0,
    "standardise": True,
    "dkd_alpha": 2.0,
    "dkd_beta": 3.0,
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

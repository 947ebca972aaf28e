from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.card import SCHEMA, GraphFacts, ModelCard, Preprocess
from rkd_deploy.errors import ModelFileError

CARD = ModelCard(
    name="digits S + A",
    labels=("zero", "one"),
    preprocess=Preprocess(height=32, width=24, mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 1.0)),
    metrics={"accuracy": 97.5, "split": "digits test", "images": 359},
)

texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
facts = st.dictionaries(
    texts, st.recursive(st.none() | st.booleans() | counts | numbers | texts, st.lists, max_leaves=4)
)
PREPROCESS: dict[str, st.SearchStrategy[Any]] = {
    "height": st.integers(1, 4096),
    "width": st.integers(1, 4096),
    "mean": st.tuples(*[st.floats(-1e6, 1e6)] * 3),
    "std": st.tuples(*[st.floats(1e-6, 1e6)] * 3),
    "interpolation": st.sampled_from(["nearest", "bilinear", "bicubic"]),
    "crop_fraction": st.floats(0.1, 1),
    "embedded": st.booleans(),
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": texts,
    "labels": st.lists(texts).map(tuple),
    "preprocess": st.builds(Preprocess, **PREPROCESS),
    "outputs": st.lists(texts, max_size=3).map(tuple),
    "part": texts,
    "fusion": texts,
    "fusion_search": facts,
    "precision": texts,
    "lowering": facts,
    "macs": counts,
    "parameters": counts,
    "graph": st.none() | st.builds(GraphFacts, macs=counts, weights=counts, zeros=counts),
    "metrics": facts,
    "parity": facts,
    "early_exit": facts,
    "source": facts,
    "versions": st.dictionaries(texts, texts),
    "checksums": st.dictionaries(texts, texts),
}


@given(st.builds(ModelCard, **FIELDS))
def test_json_gives_the_equal_card_back(card: ModelCard) -> None:
    assert ModelCard.from_json(card.to_json(), "model.json") == card


@pytest.mark.parametrize(("owner", "drawn"), [(ModelCard, FIELDS), (Preprocess, PREPROCESS)])
def test_every_field_is_drawn_here(owner: type[Any], drawn: dict[str, Any]) -> None:
    """A field that is added and not written would pass the round trip at its default."""
    assert [item.name for item in dataclasses.fields(owner)] == list(drawn)


def test_json_is_what_other_languages_expect() -> None:
    assert json.loads(CARD.to_json()) == {
        "schema": 1,
        "name": "digits S + A",
        "labels": ["zero", "one"],
        "preprocess": {
            "height": 32,
            "width": 24,
            "mean": [0.5, 0.25, 0.125],
            "std": [0.5, 0.25, 1.0],
            "interpolation": "bilinear",
            "crop_fraction": 1.0,
            "embedded": True,
            "resize": "shorter side",
            "resize_to": [32, 24],
            "antialias": True,
            "crop": "center",
            "colour_order": "RGB",
        },
        "outputs": ["logits"],
        "part": "fused",
        "fusion": "none",
        "fusion_search": {},
        "precision": "fp32",
        "lowering": {},
        "macs": 0,
        "parameters": 0,
        "graph": None,
        "metrics": {"accuracy": 97.5, "split": "digits test", "images": 359},
        "parity": {},
        "source": {},
        "early_exit": {},
        "versions": {},
        "checksums": {},
    }


def changed(**values: Any) -> str:
    return json.dumps(json.loads(CARD.to_json()) | values)


def test_fields_of_a_later_version_of_this_schema_are_passed_over() -> None:
    preprocess = json.loads(CARD.to_json())["preprocess"] | {"gamma": 2.2}
    assert ModelCard.from_json(changed(licence="MIT", preprocess=preprocess), "model.json") == CARD


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99, 0, "1", None])
def test_another_schema_is_refused_with_the_way_out(schema: object) -> None:
    with pytest.raises(ModelFileError) as caught:
        ModelCard.from_json(changed(schema=schema), "b/model.json")
    assert str(caught.value) == (
        f"b/model.json is written in card schema {schema}; this version reads schema 1. "
        "Update with: pip install -U rkd-deploy"
    )


@pytest.mark.parametrize("rule", ["resize", "resize_to", "antialias", "crop", "colour_order"])
def test_a_rule_that_this_version_cannot_follow_is_refused(rule: str) -> None:
    """Every card says them; in those of before they went without saying."""
    preprocess = json.loads(CARD.to_json())["preprocess"]
    with pytest.raises(ModelFileError, match=f"preprocess.{rule} is 'another' where this version can only do"):
        ModelCard.from_json(changed(preprocess=preprocess | {rule: "another"}), "model.json")
    del preprocess[rule]
    assert ModelCard.from_json(changed(preprocess=preprocess), "model.json") == CARD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        CARD.to_json()[:-20],
        "null",
        "7",
        "[]",
        '"text"',
        "{}",
        "\x00\xff",
        changed(preprocess={"height": 1, "width": 1, "mean": [0.5], "std": [1]}).replace("[1]", "[Infinity]"),
        changed(preprocess=None),
        changed(preprocess=[1, 2]),
        changed(preprocess={}),
        changed(preprocess={"height": 1, "width": 1, "mean": 0.5, "std": [1]}),
        changed(labels=None),
        changed(labels=3),
        changed(outputs=1.5),
        '{"schema": 1}',
        "[" * 100_000,
        '{"schema": 1, "metrics": ' + "[" * 100_000,
        '{"schema": ' + "1" * 5000 + "}",
        '{"schema": 1, "macs": ' + "1" * 30 + "}",
        changed(metrics={"accuracy": 1}).replace('"accuracy": 1', '"accuracy": NaN'),
        changed(metrics={"accuracy": 1}).replace('"accuracy": 1', '"accuracy": 1e999'),
        '{"schema": 1, "name": "no more"}',
    ],
)
def test_a_corrupt_card_is_refused_and_its_file_named(text: str) -> None:
    with pytest.raises(ModelFileError, match=r"b/model\.json.*Export .* again.* rkd-deploy export"):
        ModelCard.from_json(text, "b/model.json")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("name", 3, "name is 3 where a string is expected"),
        ("macs", "many", 'macs is "many" where a whole number is expected'),
        ("macs", True, "macs is true where a whole number is expected"),
        ("labels", ["a", 1], r"labels\[1\] is 1 where a string is expected"),
        ("labels", "ab", 'labels is "ab" where a list is expected'),
        ("metrics", [], r"metrics is \[\] where an object is expected"),
        ("checksums", {"model.onnx": 7}, r"checksums\.model\.onnx is 7 where a string is expected"),
        ("precision", None, "precision is null where a string is expected"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: object, rule: str) -> None:
    with pytest.raises(ModelFileError, match=f"b/model.json lacks a field or has a wrong one .*{rule}"):
        ModelCard.from_json(changed(**{field: value}), "b/model.json")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("height", 32.5, "height is 32.5 where a whole number is expected"),
        ("mean", ["0.5", 0.5, 0.5], r"mean\[0\] is .* where a number is expected"),
        ("std", [True, 1, 1], r"std\[0\] is true where a number is expected"),
        ("embedded", 1, "embedded is 1 where true or false is expected"),
        ("crop_fraction", "1", 'crop_fraction is "1" where a number is expected'),
        ("interpolation", 2, "interpolation is 2 where a string is expected"),
        ("height", 0, "height = 0 must be a whole number between 1 and 32768"),
        ("width", 10**15, "width = 10+ must be a whole number between 1 and 32768"),
        ("crop_fraction", 0, "crop_fraction = 0.* must be between 0.01 and 1"),
        ("crop_fraction", -0.5, "crop_fraction = -0.5 must be between 0.01 and 1"),
        ("std", [0, 1, 1], "std = 0.* must be between 1e-06 and 1000000.0"),
        ("mean", [1e300, 0, 0], r"mean = 1e\+300 must be between"),
        ("mean", [0.5, 0.5], "mean has 2 values and std 3"),
        ("mean", [], "mean has 0 values and std 3"),
        ("interpolation", "lanczos", "Unknown interpolation 'lanczos'"),
    ],
)
def test_a_value_of_another_type_in_the_preprocessing_is_refused(field: str, value: object, rule: str) -> None:
    preprocess = json.loads(CARD.to_json())["preprocess"] | {field: value}
    with pytest.raises(ModelFileError, match=rule):
        ModelCard.from_json(changed(preprocess=preprocess), "b/model.json")


@given(st.data())
def test_a_card_without_one_of_its_required_fields_is_refused(data: st.DataObject) -> None:
    content = json.loads(CARD.to_json())
    owner = data.draw(st.sampled_from([content, content["preprocess"]]))
    required = ("schema", "name", "labels", "outputs", "preprocess", "height", "width", "mean", "std")
    del owner[data.draw(st.sampled_from([key for key in required if key in owner]))]
    with pytest.raises(ModelFileError):
        ModelCard.from_json(json.dumps(content), "model.json")


def test_not_a_number_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(CARD, metrics={"accuracy": float("nan")}).to_json()


@pytest.mark.parametrize(
    ("embedded", "shape", "dtype"), [(True, (32, 24, 3), "uint8"), (False, (3, 32, 24), "float32")]
)
def test_input_of_the_graph(embedded: bool, shape: tuple[int, ...], dtype: str) -> None:
    preprocess = dataclasses.replace(CARD.preprocess, embedded=embedded)
    assert (preprocess.input_shape, preprocess.input_dtype, preprocess.channels) == (shape, dtype, 3)


def test_hugging_face_fields_are_those_of_its_image_processors() -> None:
    """Written by hand after the preprocessor_config.json of google/vit-base-patch16-224 and microsoft/resnet-50."""
    preprocess = Preprocess(
        height=224,
        width=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_fraction=0.875,
    )
    assert preprocess.to_hugging_face() == {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},  # 224 / 0.875
        "resample": 3,  # PIL.Image.BICUBIC
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,  # 1 / 255, as those files have it
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def test_hugging_face_numbers_of_interpolations_are_pillows() -> None:
    from PIL import Image

    for name in ("nearest", "bilinear", "bicubic"):
        preprocess = dataclasses.replace(CARD.preprocess, interpolation=name)
        assert preprocess.to_hugging_face()["resample"] == Image.Resampling[name.upper()]

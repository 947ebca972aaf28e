"""The protocol as bytes: whatever comes is read as what it is, or refused; no length that is stated is trusted."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.serve.http.metrics import BUCKETS, CODES, ENDPOINTS, SharedCounts
from rkd_deploy.serve.http.protocol import SERVED_OUTPUTS, TensorInterface, build_answer, parse_request

LABELS = ("red", "green", "a:b")
SHAPE = (2, 3, 3)
PIXELS = TensorInterface("model", "input", SHAPE, "uint8", LABELS, 4)
FLOATS = TensorInterface("model", "input", SHAPE, "float32", LABELS, 4)

names = st.sampled_from(["input", "logits", "probabilities", "other", ""])
numbers = st.integers(-2, 300) | st.integers(2**31 - 1, 2**33) | st.floats(allow_nan=False) | st.booleans() | st.none()
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "classification", "binary_data_output"]), numbers
)
near_requests = st.fixed_dictionaries(
    {
        "inputs": st.lists(
            st.fixed_dictionaries(
                {
                    "name": names,
                    "shape": st.just([1, *SHAPE]) | st.lists(numbers, max_size=4),
                    "datatype": st.sampled_from(["UINT8", "BYTES", "FP32", "INT64"]),
                },
                optional={"data": st.lists(numbers | st.text(max_size=4), max_size=20), "parameters": parameters},
            ),
            max_size=2,
        )
    },
    optional={
        "outputs": st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": parameters}), max_size=3),
        "id": st.text(max_size=3) | numbers,
        "parameters": parameters,
    },
)


@settings(max_examples=400)
@given(near_requests, st.binary(max_size=40), st.none() | st.integers(-1, 400) | st.text(max_size=3))
def test_whatever_is_sent_is_read_or_refused(request: dict[str, Any], tail: bytes, length: object) -> None:
    head = json.dumps(request).encode()
    stated = str(len(head)) if length == 7 else None if length is None else str(length)
    for interface in (PIXELS, FLOATS):
        try:
            read = parse_request(head + tail, stated, interface)
        except UsageError:
            continue
        assert (read.tensor is None) == bool(read.images)
        count = len(read.images) if read.tensor is None else len(read.tensor)
        assert 1 <= count <= 4


@settings(max_examples=200)
@given(st.binary(max_size=200), st.none() | st.integers(0, 300).map(str))
def test_any_bytes_are_refused(body: bytes, length: str | None) -> None:
    with pytest.raises(UsageError):
        parse_request(body, length, PIXELS)


def binary(x: np.ndarray[Any, Any] | bytes, shape: list[int], datatype: str) -> tuple[bytes, str]:
    content = x if isinstance(x, bytes) else x.tobytes()
    tensor = {"name": "input", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(content)}}
    head = json.dumps({"inputs": [tensor], "id": "7"}).encode()
    return head + content, str(len(head))


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_tensors_come_through_as_they_were(count: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    pixels = chance.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    floats = chance.standard_normal((count, *SHAPE)).astype(np.float32)
    for x, interface, datatype in ((pixels, PIXELS, "UINT8"), (floats, FLOATS, "FP32")):
        shape = [count, *SHAPE]
        for data in (x.tolist(), x.ravel().tolist()):
            tensor = {"name": "input", "shape": shape, "datatype": datatype, "data": data}
            read = parse_request(json.dumps({"inputs": [tensor]}).encode(), None, interface)
            np.testing.assert_array_equal(read.tensor, x)
            assert read.tensor is not None
            assert read.tensor.dtype == x.dtype
        read = parse_request(*binary(x, shape, datatype), interface)
        np.testing.assert_array_equal(read.tensor, x)
        assert read.id == "7"


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
def test_texts_come_through_as_they_were(images: list[bytes]) -> None:
    content = b"".join(struct.pack("<I", len(image)) + image for image in images)
    assert parse_request(*binary(content, [len(images)], "BYTES"), PIXELS).images == tuple(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    x = np.zeros((1, *SHAPE), np.float32)
    x[0, 1, 1, 1] = value
    with pytest.raises(UsageError, match="NaN or infinity"):
        parse_request(*binary(x, [1, *SHAPE], "FP32"), FLOATS)
    huge = {"name": "input", "shape": [1, *SHAPE], "datatype": "FP32", "data": [1e300] * 18}
    with pytest.raises(UsageError, match="NaN or infinity"):  # more than float32 can be
        parse_request(json.dumps({"inputs": [huge]}).encode(), None, FLOATS)


@given(
    st.integers(1, 3),
    st.permutations(SERVED_OUTPUTS),
    st.lists(st.booleans(), min_size=2, max_size=2),
    st.integers(0, 5),
)
def test_an_answer_read_by_its_own_rules_holds_every_output(
    count: int, order: list[str], in_binary: list[bool], classes: int
) -> None:
    outputs = [
        {"name": name, "parameters": {"binary_data": flag, "classification": classes}}
        for name, flag in zip(order, in_binary, strict=True)
    ]
    tensor = {"name": "input", "shape": [1, *SHAPE], "datatype": "UINT8", "data": [0] * 18}
    request = parse_request(json.dumps({"inputs": [tensor], "outputs": outputs}).encode(), None, PIXELS)
    answers = {name: np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32) for name in SERVED_OUTPUTS}
    body, headers = build_answer(request, answers, PIXELS)
    length = int(headers.get("inference-header-content-length", len(body)))
    head, place = json.loads(body[:length]), length
    assert ("inference-header-content-length" in headers) == any(in_binary)
    assert [output["name"] for output in head["outputs"]] == order
    for output in head["outputs"]:
        values = answers[output["name"]]
        if "data" not in output:
            size = output["parameters"]["binary_data_size"]
            content, place = body[place : place + size], place + size
            data: list[Any] = list(texts(content)) if classes else np.frombuffer(content, "<f4").tolist()
        else:
            data = output["data"]
        if classes:
            assert output["shape"] == [count, min(classes, 3)]
            best = np.argsort(-values, axis=1)[:, :classes]
            assert [text.split(":", 2)[1:] for text in data] == [[str(k), LABELS[k]] for k in best.ravel()]
        else:
            np.testing.assert_array_equal(np.reshape(data, output["shape"]).astype(np.float32), values)
    assert place == len(body)


def texts(content: bytes) -> Any:
    while content:
        (size,) = struct.unpack_from("<I", content)
        yield content[4 : 4 + size].decode()
        content = content[4 + size :]


def test_the_interface_is_the_cards() -> None:
    for embedded, shape, datatype in ((True, [-1, 4, 6, 3], "UINT8"), (False, [-1, 3, 4, 6], "FP32")):
        rule = Preprocess(height=4, width=6, mean=(0.5,) * 3, std=(0.5,) * 3, embedded=embedded)
        card = ModelCard(name="Digits S + A!", labels=LABELS, preprocess=rule)
        content = TensorInterface.of(card, "x", 8).metadata()
        assert content["name"] == "digits-s-a"
        assert content["inputs"] == [{"name": "x", "datatype": datatype, "shape": shape}]


def test_counts_of_all_workers_add_up_and_a_dead_ones_stay() -> None:
    counts = SharedCounts()
    first, second = counts.claim(), counts.claim()
    first.count("classify", 200)
    second.count("classify", 200)
    second.count("infer", 418)
    second.observe("decode", BUCKETS[1])
    first.observe("decode", 100.0)
    del second
    lines = first.text().splitlines()
    assert 'rkd_requests_total{endpoint="classify",code="200"} 2' in lines
    assert 'rkd_requests_total{endpoint="infer",code="400"} 1' in lines
    buckets = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("rkd_decode_seconds_bucket")]
    assert buckets == ["0"] + ["1"] * (len(BUCKETS) - 1) + ["2"]
    assert "rkd_decode_seconds_count 2" in lines
    assert "rkd_decode_seconds_sum 100.002500" in lines
    for endpoint in ENDPOINTS:
        for code in CODES:
            first.count(endpoint, code)
    assert sum(line.startswith("rkd_requests_total") for line in first.text().splitlines()) == 30

"""A real server answers the golden photo on every way to ask it, and refuses what is none of its business."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import rkd_deploy

MODEL = "/v2/models/tiny-s-a"
INFER = f"{MODEL}/infer"


@pytest.fixture(scope="module")
def golden(photo_bundle):
    return dict(np.load(photo_bundle / "golden.npz"))


@pytest.fixture(scope="module")
def classifier(photo_bundle):
    with rkd_deploy.load(photo_bundle, threads=1) as loaded:
        yield loaded


def asked(tensor, *, outputs=(), parameters=None, **fields):
    request = {"inputs": [{"name": "input", **tensor}], **fields}
    if outputs:
        request["outputs"] = list(outputs)
    if parameters is not None:
        request["parameters"] = parameters
    return request


def in_binary(x, datatype="UINT8", **fields):
    """The body and the header of a request with the tensor behind the JSON."""
    content = x if isinstance(x, bytes) else x.tobytes()
    shape = fields.pop("shape", None) or list(x.shape)
    tensor = {"shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(content)}}
    head = json.dumps(asked(tensor, **fields)).encode()
    return head + content, {"Inference-Header-Content-Length": str(len(head))}


def text_tensor(*elements):
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def tensors(answer):
    """Outputs of an answer in JSON by name."""
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer.json["outputs"]}


def test_an_image_gets_its_labels(server, photo, expected, classifier):
    answer = server.ask("/v1/classify?top=3", photo)
    assert answer.status == 200
    assert answer.json["model"] == "tiny-s-a"
    found = answer.json["predictions"]
    assert (found[0]["label"], found[0]["index"]) == (expected["label"], expected["index"])
    assert found[0]["probability"] == pytest.approx(expected["probability"], abs=1e-3)
    here = classifier.predict(Image.open(io.BytesIO(photo)), top=3)
    assert [guess["label"] for guess in found] == [guess.label for guess in here]
    assert [guess["probability"] for guess in found] == pytest.approx([guess.probability for guess in here])
    assert set(answer.json["milliseconds"]) == {"decode", "inference"}
    assert len(server.ask("/v1/classify", photo).json["predictions"]) == 5
    assert len(server.ask("/v1/classify?top=1000", photo).json["predictions"]) == 10  # all of them


def test_the_protocols_metadata(server):
    assert server.ask("/v2").json["name"] == "rkd-deploy"
    assert "binary_tensor_data" in server.ask("/v2").json["extensions"]
    for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
        assert server.ask(path).status == 200
    for path in (MODEL, f"{MODEL}/versions/1"):
        content = server.ask(path).json
        (given,), outputs = content["inputs"], content["outputs"]
        assert given == {"name": "input", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}
        assert outputs[0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 10]}


@pytest.mark.parametrize("version", ["", "/versions/1"])
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_in_json_get_the_golden_logits(server, golden, nested, version):
    x = golden["inputs"]
    data = x.tolist() if nested else x.ravel().tolist()
    body = json.dumps(asked({"shape": list(x.shape), "datatype": "UINT8", "data": data}, id="mine"))
    answer = server.ask(f"{MODEL}{version}/infer", body)
    assert answer.status == 200, answer.json
    assert (answer.json["id"], answer.json["model_name"], answer.json["model_version"]) == ("mine", "tiny-s-a", "1")
    found = tensors(answer)
    np.testing.assert_allclose(found["logits"], golden["logits"], atol=1e-4)
    exponentials = np.exp(golden["logits"])
    np.testing.assert_allclose(found["probabilities"], exponentials / exponentials.sum(1, keepdims=True), atol=1e-5)


def test_tensors_in_binary_get_the_golden_logits_in_binary(server, golden):
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    answer = server.ask(INFER, *in_binary(golden["inputs"], outputs=wanted))
    length = int(answer.headers["inference-header-content-length"])
    head = json.loads(answer.body[:length])
    logits, probabilities = head["outputs"]
    assert logits["parameters"] == {"binary_data_size": 4 * golden["logits"].size}
    found = np.frombuffer(answer.body[length:], "<f4").reshape(logits["shape"])
    np.testing.assert_allclose(found, golden["logits"], atol=1e-4)
    assert len(probabilities["data"]) == found.size
    everything = server.ask(INFER, *in_binary(golden["inputs"], parameters={"binary_data_output": True}))
    length = int(everything.headers["inference-header-content-length"])
    assert len(everything.body) - length == 2 * 4 * found.size


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_bytes_are_encoded_images(server, photo, expected, shape):
    png = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(png, "PNG")
    images = [photo, png.getvalue()]
    texts = [base64.b64encode(image).decode() for image in images]
    binary = in_binary(text_tensor(*images), "BYTES", shape=shape)
    for body, headers in ((json.dumps(asked({"shape": shape, "datatype": "BYTES", "data": texts})), {}), binary):
        answer = server.ask(INFER, body, headers)
        assert answer.status == 200, answer.json
        np.testing.assert_allclose(tensors(answer)["logits"], [expected["logits"]] * 2, atol=expected["tolerance"])


def test_the_classification_extension_gives_labels(server, golden, photo_bundle):
    labels = (photo_bundle / "labels.txt").read_text().split()
    wanted = [{"name": "logits", "parameters": {"classification": 3}}]
    answer = server.ask(INFER, *in_binary(golden["inputs"], outputs=wanted))
    (output,) = answer.json["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [8, 3])
    for place, row in enumerate(golden["logits"]):
        texts = [text.split(":") for text in output["data"][3 * place : 3 * place + 3]]
        best = np.argsort(-row)[:3]
        assert [text[1:] for text in texts] == [[str(k), labels[k]] for k in best]
        np.testing.assert_allclose([float(text[0]) for text in texts], row[best], atol=1e-4)


def test_many_clients_at_once_each_get_their_own_answer(server, golden):
    def ask(place):
        x = golden["inputs"][place % 8 : place % 8 + 1]
        return tensors(server.ask(INFER, *in_binary(x)))["logits"][0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(64)))
    np.testing.assert_allclose(found, np.tile(golden["logits"], (8, 1)), atol=1e-4)


X = np.zeros((1, 8, 8, 3), np.uint8)
FLAT = {"shape": [1, 8, 8, 3], "datatype": "UINT8", "data": [0] * 192}
REFUSED = {
    "no JSON": (b"{", "no JSON"),
    "a list": (b"[]", "where an object is expected"),
    "not UTF-8": (b"\xff\xfe", "not what it has to be"),
    "deep": (b'{"inputs":' + b"[" * 100_000, "nested too deeply"),
    "no inputs": ({}, "inputs is missing"),
    "two inputs": ({"inputs": [{"name": "input", **FLAT}] * 2}, "has 2 inputs"),
    "another name": ({"inputs": [{"name": "image", **FLAT}]}, "Unknown input 'image'. Choices: input"),
    "another type": (asked({**FLAT, "datatype": "FP32"}), "datatype 'FP32'; it must be UINT8, or BYTES"),
    "another shape": (asked({**FLAT, "shape": [1, 3, 8, 8]}), "it must be [N, 8, 8, 3], N from 1 to 8"),
    "no batch": (asked({**FLAT, "shape": []}), "shape []"),
    "no images": (asked({**FLAT, "shape": [0, 8, 8, 3], "data": []}), "N from 1 to 8"),
    "too many": (asked({**FLAT, "shape": [9, 8, 8, 3], "data": [0] * 9 * 192}), "N from 1 to 8"),
    "too few values": (asked({**FLAT, "data": [0] * 191}), "not 192 values"),
    "ragged": (asked({**FLAT, "data": [[[[0] * 3] * 8] * 7 + [[[0] * 3] * 9]]}), "not 192 values"),
    "not in the shape's lists": (asked({**FLAT, "data": [[0] * 96] * 2}), "not 192 values"),
    "256": (asked({**FLAT, "data": [256] * 192}), "whole numbers from 0 to 255"),
    "minus one": (asked({**FLAT, "data": [-1] * 192}), "whole numbers from 0 to 255"),
    "true": (asked({**FLAT, "data": [True] * 192}), "whole numbers"),
    "texts": (asked({**FLAT, "data": ["0"] * 192}), "whole numbers"),
    "NaN": (json.dumps(asked({**FLAT, "data": [float("nan")] * 192})), "NaN is no number in JSON"),
    "no data": (asked({key: FLAT[key] for key in ("shape", "datatype")}), "must have either data"),
    "another output": (asked(FLAT, outputs=[{"name": "features"}]), "Unknown output 'features'"),
    "an output twice": (asked(FLAT, outputs=[{"name": "logits"}] * 2), "asked for twice"),
    "no base64": (asked({"shape": [1], "datatype": "BYTES", "data": ["%"]}), "base64"),
    "numbers for images": (asked({"shape": [1], "datatype": "BYTES", "data": [1]}), "base64"),
    "no image": (asked({"shape": [1], "datatype": "BYTES", "data": ["AAAA"]}), "cannot be read as an image"),
    "shared memory": (
        asked({**FLAT, "parameters": {"shared_memory_region": "x"}}), "Shared memory is not served",
    ),
    "classes below 0": (
        asked(FLAT, outputs=[{"name": "logits", "parameters": {"classification": -1}}]), "classification is -1",
    ),
    "bytes that no header announces": (in_binary(X)[0], "no JSON"),
    "a length that is none": ((in_binary(X)[0], "minus one"), "inference-header-content-length is 'minus one'"),
    "a length beyond the body": ((in_binary(X)[0], "100000"), "at most"),
    "a size that is not the tensor's": (in_binary(bytes(191), shape=[1, 8, 8, 3]), "takes 192 bytes"),
    "another type in binary": (in_binary(X.astype(np.float32), "FP32"), "datatype 'FP32'; it must be UINT8, or BYTES"),
    "another shape in binary": (in_binary(X.reshape(1, 3, 8, 8)), "it must be [N, 8, 8, 3], N from 1 to 8"),
    "more bytes than were stated": ((in_binary(X)[0] + b"x", in_binary(X)[1]), "193 bytes follow the JSON"),
    "a text longer than the body": (in_binary(struct.pack("<I", 2**31) + b"x", "BYTES", shape=[1]), "not 1 elements"),
    "half a length": (in_binary(b"\x01\x00", "BYTES", shape=[1]), "not 1 elements"),
    "fewer texts": (in_binary(text_tensor(b"a"), "BYTES", shape=[2]), "not 2 elements"),
    "more texts": (in_binary(text_tensor(b"a", b"b"), "BYTES", shape=[1]), "not 1 elements"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_in_the_protocols_form(server, name):
    request, words = REFUSED[name]
    headers = {}
    if isinstance(request, tuple):
        request, length = request
        headers = length if isinstance(length, dict) else {"Inference-Header-Content-Length": length}
    answer = server.ask(INFER, json.dumps(request) if isinstance(request, dict) else request, headers)
    assert answer.status == 400, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"error"}
    assert words in answer.json["error"]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nothing", "GET", 404),
        ("/v2/models/other", "GET", 404),
        ("/v2/models/other/infer", "POST", 404),
        ("/v2/models/tiny-s-a/versions/2", "GET", 404),
        ("/../../etc/passwd", "GET", 404),
        ("/page/index.html", "GET", 404),
        ("/v1/classify", "GET", 405),
        ("/v2", "DELETE", 405),
        ("/v1/classify?top=0", "POST", 400),
        ("/v1/classify?top=-1", "POST", 400),
        ("/v1/classify?top=many", "POST", 400),
        ("/v1/classify", "POST", 400),  # an empty body
    ],
)
def test_other_addresses_are_errors_in_json(server, path, method, status):
    answer = server.ask(path, b"" if method == "POST" else None, method=method)
    assert answer.status == status
    assert list(answer.json) == ["error"]


def png_header(width, height):
    """A PNG that says it is so large, and holds next to nothing."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_is_too_large_is_refused_before_it_is_read_or_decoded(server):
    assert "1,000,000 that are decoded" in server.ask("/v1/classify", png_header(1001, 1000)).json["error"]
    assert server.ask("/v1/classify", png_header(2**30, 2**30)).status == 400
    stated = server.ask("/v1/classify", bytes(1_000_001))
    assert stated.status == 413
    assert "1,000,000 bytes" in stated.json["error"]
    pieces = server.ask("/v1/classify", iter([bytes(600_000)] * 2))  # chunked: it names no length
    assert pieces.status == 413
    packed = server.ask("/v1/classify", zlib.compress(bytes(100)), {"Content-Encoding": "deflate"})
    assert packed.status == 415


def picture(mode="RGB", suffix="PNG", **options):
    rows = np.linspace(0, 255, 40 * 30, dtype=np.uint8).reshape(30, 40)
    image = Image.fromarray(np.stack([rows, rows[::-1], rows[:, ::-1]], axis=2)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    return picture(suffix="JPEG", exif=exif, quality=95)


def animated():
    first, second = Image.new("RGB", (20, 20), (200, 30, 30)), Image.new("RGB", (20, 20), (0, 0, 255))
    stream = io.BytesIO()
    first.save(stream, "GIF", save_all=True, append_images=[second])
    return stream.getvalue()


READ = {
    "JPEG": picture(suffix="JPEG"),
    "WebP": picture(suffix="WEBP"),
    "BMP": picture(suffix="BMP"),
    "CMYK": picture("CMYK", "JPEG"),
    "palette": picture("P"),
    "grey": picture("L"),
    "transparent": picture("RGBA"),
    "rotated": rotated(),
    "animated": animated(),
}


@pytest.mark.parametrize("name", READ)
def test_images_of_every_kind_get_what_load_gives_for_them(server, classifier, name, tmp_path):
    (tmp_path / "image").write_bytes(READ[name])
    here = classifier.predict(tmp_path / "image", top=10)
    found = server.ask("/v1/classify?top=10", READ[name]).json["predictions"]
    assert [guess["index"] for guess in found] == [guess.index for guess in here]
    assert [guess["probability"] for guess in found] == pytest.approx([guess.probability for guess in here], abs=1e-6)


@pytest.mark.parametrize(
    "content",
    [b"no image", b"\xff\xd8\xff\xe0" + bytes(50), picture()[:200], picture(suffix="JPEG")[:300], picture("I;16")],
    ids=["text", "a header alone", "half a PNG", "half a JPEG", "16 bits"],
)
def test_images_that_are_none_are_refused(server, content):
    answer = server.ask("/v1/classify", content)
    assert answer.status == 400
    assert answer.json["error"].startswith("The image")


def test_an_empty_body_is_told_from_a_broken_image(server):
    assert server.ask("/v1/classify", b"").json["error"].startswith("The request has no body: send an image's bytes")


def test_metrics_count_every_request(server, photo):
    def counts():
        lines = [line.rsplit(" ", 1) for line in server.ask("/metrics").body.decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = counts()
    for _ in range(3):
        server.ask("/v1/classify", photo)
    server.ask("/v1/classify", b"no image")
    after = counts()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('rkd_requests_total{endpoint="classify",code="200"}') == 3
    assert grown('rkd_requests_total{endpoint="classify",code="400"}') == 1
    for histogram, count in (("decode", 3), ("inference", 3), ("request", 4)):
        assert grown(f"rkd_{histogram}_seconds_count") == count
        assert grown(f'rkd_{histogram}_seconds_bucket{{le="+Inf"}}') == count
        assert 0 < grown(f"rkd_{histogram}_seconds_sum") < 60

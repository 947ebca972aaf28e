"""Bad input to the command: value, rule and way out, the exit code, and every file as it was before."""

import hashlib
import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from preparing import reseal
from safetensors import safe_open
from safetensors.torch import save_file

from rkd_deploy.data.sources import load_images
from rkd_deploy.pipeline import export_run


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """A bundle of the shared run; copy it before writing into it."""
    return export_run(tiny_run, test_images=False, folder=tmp_path_factory.mktemp("exported") / "bundle").folder


@pytest.fixture
def bundle(exported, runs):
    """A bundle of one's own, in the run that the command takes."""
    return shutil.copytree(exported, runs / "bundle")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(rkd, tmp_path, code, words, *arguments):
    before = contents(tmp_path)
    outcome = rkd(*arguments)
    assert outcome.code == code, outcome.err
    for word in (words,) if isinstance(words, str) else words:
        assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("package", "arguments", "words"),
    [
        ("modelopt", ["--precision", "fp8", "--target", "tensorrt"], "pip install 'rkd-deploy[quant]'"),
        ("openvino", ["--precision", "int8", "--target", "openvino"], "pip install 'rkd-deploy[openvino]'"),
        ("openvino", ["--precision", "bf16", "--target", "tensorrt"], "pip install 'rkd-deploy[openvino]'"),
        ("openvino", ["--fuse", "auto", "--backend", "openvino"], "pip install 'rkd-deploy[openvino]'"),
        ("tensorrt", ["--format", "tensorrt"], "pip install 'rkd-deploy[tensorrt]'"),
    ],
)
def test_a_target_that_is_not_installed(rkd, bundle, tmp_path, monkeypatch, package, arguments, words):
    monkeypatch.setitem(sys.modules, package, None)
    refused(rkd, tmp_path, 1, [f"{package} is needed here and is not installed", words], "export", *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(rkd, runs, bundle, tmp_path, value):
    for file in (runs / "weights").iterdir():
        with safe_open(file, "pt") as stored:
            metadata, weights = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        next(tensor for tensor in weights.values() if tensor.ndim == 4).view(-1)[0] = value
        save_file(weights, file, metadata)
    reseal(runs)
    refused(rkd, tmp_path, 1, ["NaN or infinite weights (first: ", "lower train.lr"], "export", "--random-images")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("empty", "holds no image"), ("missing", "is no folder"), ("a file", "is no folder"), ("broken", "photo.jpg")],
)
def test_a_calibration_folder_that_gives_no_images(rkd, bundle, tmp_path, kind, words):
    folder = tmp_path / "photos"
    if kind == "a file":
        folder.write_text("no folder")
    elif kind != "missing":
        (folder / "inside").mkdir(parents=True)
    if kind == "broken":
        (folder / "inside/photo.jpg").write_bytes(b"no photo")
    refused(rkd, tmp_path, 1, ["photos", words], "export", "--precision", "int8", "--calibration", "photos")


def test_data_of_other_classes_than_the_run_was_trained_on(rkd, runs, bundle, tmp_path):
    facts = json.loads((runs / "facts.json").read_text())
    facts["classes"][9] = "nine"
    (runs / "facts.json").write_text(json.dumps(facts))
    reseal(runs)
    words = ["was trained on 10 classes, and its data now have 10; the difference is 9, nine", "--random-images"]
    refused(rkd, tmp_path, 1, words, "export")
    refused(rkd, tmp_path, 1, words, "export", "--random-images", "--precision", "int8")
    assert rkd("export", "--random-images").code == 0


def test_a_folder_that_exists(rkd, bundle, tmp_path):
    words = "bundle exists already and is never overwritten"
    refused(rkd, tmp_path, 1, words, "export", "--output", bundle)


def newer(bundle):
    (bundle / "model.json").write_text((bundle / "model.json").read_text().replace('"schema": 1', '"schema": 2'))
    return "written in card schema 2; this version reads schema 1. Update with: pip install -U rkd-deploy"


def changed(bundle):
    (bundle / "labels.txt").write_text("zero\n")
    return "labels.txt changed (by the checksums in model.json). Copy it again"


def leaving(bundle):
    model = onnx.load(bundle / "model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (bundle.parent / "outside.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "../outside.bin"
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    (bundle / "model.json").unlink()  # else its checksums notice first
    return "outside"


@pytest.mark.parametrize("spoil", [newer, changed, leaving])
def test_a_bundle_that_is_not_what_it_should_be(rkd, bundle, tmp_path, spoil):
    words = spoil(bundle)
    for arguments in (
        ["export", bundle, "--format", "tensorrt-rtx"],
        ["export", bundle, "--format", "triton"],
        ["verify", bundle],
        ["info", bundle],
        ["predict", bundle, "photo.png"],
    ):
        missing = arguments[0] == "verify" and not (bundle / "model.json").exists()  # noticed before the file is read
        refused(rkd, tmp_path, 1, "has no checksums" if missing else words, *arguments)


def sha256_of(run, places):
    """Of so many training images as they are stored, height before width before channels."""
    pixels = load_images(run.recipe.data, run.recipe.train.seed).train.images_NCHW[places].permute(0, 2, 3, 1).numpy()
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def test_a_gate_that_fails_leaves_the_report_and_the_bundle_before_it(rkd, tiny_run, runs, bundle, tmp_path):
    file = runs / "weights/teacher.safetensors"
    with safe_open(file, "pt") as stored:
        metadata, weights = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    for name in ("bn1.weight", "bn1.bias"):  # as in conftest.py's `uneven`
        weights[f"layer2.0.{name}"][0] *= 3000
    weights["layer2.0.conv2.weight"][:, 0] /= 3000
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    save_file(weights, file, metadata)
    reseal(runs)
    before = contents(tmp_path)
    request = ["export", "--part", "teacher", "--precision", "int8", "--target", "tensorrt", "--min-agreement", "97"]
    request += ["--max-drop", "100", "--random-images", "--seed", "3", "--calibration-count", "64"]
    failed = rkd(*request, "--json")
    assert failed.code == failed.json["exit_code"] == 3
    report = runs / "bundle-teacher.report.json"
    assert str(report.relative_to(tmp_path)) in failed.err
    after = contents(tmp_path)
    assert json.loads(after.pop(report))["gate"]["passed"] is False
    assert after == before
    searched = rkd(*request, "--keep", "auto", "--json")
    assert searched.code == 0, searched.err
    assert "Left in float32: layer2.0.conv2." in searched.err
    card = rkd("info", runs / "bundle-teacher", "--json").json
    assert card["lowering"]["kept"] == ["layer2.0.conv2"]
    assert card["lowering"]["calibration"] == {
        "images": 64,
        "source": "digits training images",
        "seed": 3,
        "sha256": sha256_of(tiny_run, np.sort(np.random.default_rng(3).permutation(270)[:64])),
    }
    assert next(iter(card["lowering"]["harms"])) == "layer2.0.conv2"
    assert "layer2.0.conv2" in rkd("info", runs / "bundle-teacher").out


def test_weights_that_were_zeroed_do_not_pass_for_those_that_were_tested(rkd, runs, tmp_path):
    """The file reads well, and parity holds, since PyTorch is given the same zeros."""
    weights = runs / "weights/assistant.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20_000:] = bytes(20_000)
    weights.write_bytes(content)
    refused(rkd, tmp_path, 1, ["is not the file that this run ended with"], "export", str(runs))
    reseal(runs)  # as of an earlier version, which recorded no checksums
    refused(rkd, tmp_path, 3, ["was tested at", "Its weights or the images were changed"], "export", str(runs))

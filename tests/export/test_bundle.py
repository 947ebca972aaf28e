"""The bundle appears whole and proven, or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

import rkd_deploy.export.bundle as bundle_module
from rkd_deploy.bench.parity import verify
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import GateError, StorageError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.fusion import fuse
from rkd_deploy.pipeline import export_run


def contents(folder):
    """Every file of a folder by its name in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def batches(model, card, count=40):
    """Random images whose labels are what PyTorch says of all but the first four of them."""
    x = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    scaled = (x / 255 - np.array(card.preprocess.mean)) / np.array(card.preprocess.std)
    with torch.no_grad():
        labels = model(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()).argmax(1).numpy()
    labels[:4] = (labels[:4] + 1) % 5
    return [(x[:16], labels[:16]), (x[16:], labels[16:])]


def test_everything_an_app_needs_is_there(model, card, tmp_path):
    proof = export_bundle(model, card, tmp_path / "bundle", batches=batches(model, card), with_pytorch=True)
    files = set(contents(tmp_path / "bundle"))
    assert files == {
        "model.onnx", "model.json", "labels.txt", "preprocessor_config.json", "golden.npz", "model.pt2",
        "golden/photo.jpg", "golden/photo.json",
    }  # fmt: skip
    assert (proof.images, proof.differing) == (40, 0)
    assert proof.torch_top1 == proof.onnx_top1 == 90.0  # 4 of 40 were mislabelled
    written = ModelCard.from_json((tmp_path / "bundle/model.json").read_text(), "model.json")
    session = onnxruntime.InferenceSession(tmp_path / "bundle/model.onnx")
    unsealed = replace(written, checksums={})  # a file cannot hold its own sum
    assert unsealed.to_json() in session.get_modelmeta().custom_metadata_map.values()
    assert set(written.checksums) == files
    assert written.fusion == "tail"
    assert written.parity["onnx_top1"] == 90.0
    assert (tmp_path / "bundle/labels.txt").read_text() == "a\nb\nc\nd\ne\n"
    assert json.loads((tmp_path / "bundle/preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("label", ["a\nb", "a\rb", "", " ", "\udcff"])
def test_a_label_that_is_no_line_is_refused(model, card, tmp_path, label):
    """Whoever reads labels.txt by lines would give every class after it the name of another."""
    labels = (label, *card.labels[1:])
    with pytest.raises(UsageError, match=r"^The class .* Give it another name\.$"):
        export_bundle(model, replace(card, labels=labels), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_it_proves_itself_on_every_backend(model, card, tmp_path, backend):
    export_bundle(model, card, tmp_path / "bundle", with_pytorch=True)
    parity = verify(tmp_path / "bundle", backend)
    assert parity.passed
    assert parity.n == 9  # with the photo


def test_same_model_same_bytes(model, card, tmp_path):
    for name in ("one", "two"):
        export_bundle(model, card, tmp_path / name, batches=batches(model, card))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_process_writes_the_same_bytes(tiny_run, tmp_path):
    """Same run, same settings; another seed of hashes, which gives sets another order, changes no byte."""
    here = export_run(tiny_run, test_images=False, folder=tmp_path / "here").folder
    command = ["export", str(tiny_run.folder), "--random-images", "--output", "there"]
    # One thread, as in this process: another number of them may add in another order.
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "rkd_deploy.cli", *command], cwd=tmp_path, env=environment, check=True)
    assert contents(tmp_path / "there") == contents(here)


@pytest.mark.parametrize("level", ["sum", "tail"])
def test_one_perturbed_weight_fails_the_gate_and_leaves_nothing(model, card, tmp_path, monkeypatch, level):
    def perturbed(network, chosen):
        fused = fuse(network, chosen)
        with torch.no_grad():
            next(parameter for parameter in fused.parameters() if parameter.ndim == 4)[0, 0, 0, 0] += 0.1
        return fused

    monkeypatch.setattr(bundle_module, "fuse", perturbed)
    with pytest.raises(GateError, match=r"tolerance is 0\.0001") as caught:
        export_bundle(model, card, tmp_path / "bundle", level=level)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_class_fails_the_gate_however_wide_the_tolerance(model, card, tmp_path, monkeypatch):
    def swapped(network, chosen):
        fused = fuse(network, chosen)
        with torch.no_grad():
            fused.head.weight.copy_(fused.head.weight.roll(1, 0))
            fused.head.bias.copy_(fused.head.bias.roll(1, 0))
        return fused

    monkeypatch.setattr(bundle_module, "fuse", swapped)
    with pytest.raises(GateError, match=r"classifies \d+ of 64 images otherwise"):
        export_bundle(model, card, tmp_path / "bundle", tolerance=1e6)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_touched(model, card, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="never overwritten"):
        export_bundle(model, card, tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["mine.txt"]


def test_float32_bundles_prove_themselves_too(model, card, tmp_path):
    card = replace(card, preprocess=replace(card.preprocess, embedded=False))
    proof = export_bundle(model, card, tmp_path / "bundle", batches=batches(model, card))
    assert proof.onnx_top1 == 90.0
    assert np.load(tmp_path / "bundle/golden.npz")["inputs"].shape == (8, 3, 8, 8)


@pytest.mark.parametrize(("stated", "passes"), [(90.0, True), (92.5, True), (95.0, False), (45.0, False)])
def test_an_accuracy_that_the_card_states_is_held_against_the_images(model, card, tmp_path, stated, passes):
    """The network is right on 36 of 40: 0.5 points of 40 images are one, rounded up."""
    claiming = replace(card, metrics={"accuracy": stated, "images": 40})
    if passes:
        export_bundle(model, claiming, tmp_path / "bundle", batches=batches(model, card))
        return
    with pytest.raises(GateError, match=rf"tested at {stated:.2f} % of 40 images .* right on 90\.00 %.*1 images more"):
        export_bundle(model, claiming, tmp_path / "bundle", batches=batches(model, card))
    assert list(tmp_path.iterdir()) == []


def test_an_accuracy_on_other_images_is_not_compared(model, card, tmp_path):
    claiming = replace(card, metrics={"accuracy": 12.0, "images": 41})
    export_bundle(model, claiming, tmp_path / "bundle", batches=batches(model, card))


def test_each_stage_is_named_as_it_begins(model, card, tmp_path):
    stages = []
    export_bundle(model, card, tmp_path / "bundle", note=stages.append)
    assert [stage.split()[0] for stage in stages] == ["fusing", "proving", "writing"]

"""Early exit: 0 is S alone, above 1 is S + A, and each image of a mixed batch goes its own way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd_deploy import load
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import GateError, ModelFileError, UsageError
from rkd_deploy.export import early_exit
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.early_exit import EarlyExit
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.serve.early_exit import confidence, exit_steps, load_early_exit
from tests.support.adapters import learnt

LABELS = ("a", "b", "c", "d")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
IMAGES[::2] //= 5  # two kinds of images, so that S is not as sure of one as of the other
TRUTH = np.arange(40) % 4
PREPROCESS = Preprocess(height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def network_of(assistants: int) -> ResidualStudent:
    torch.manual_seed(3)
    chain = [CifarResNet(8, (4, 4, 6, 5), None) for _ in range(assistants)]
    model = ResidualStudent(CifarResNet(8, (8, 8, 8, 12), None), chain, 10, len(LABELS))
    for adapter in model.assistant_adapters:
        learnt(adapter, std=0.5)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=[2])  # each export takes a second
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResidualStudent, Path]:
    """S with one or two assistants, exported."""
    model, folder = network_of(request.param), tmp_path_factory.mktemp("exits") / "bundle"
    card = ModelCard(name="exits", labels=LABELS, preprocess=PREPROCESS)
    arguments = EarlyExit(
        held_out=[(IMAGES[:20], TRUTH[:20])], test=[(IMAGES[:25], TRUTH[:25]), (IMAGES[25:], TRUTH[25:])]
    )
    export_bundle(model, card, folder, batches=[(IMAGES, TRUTH)], early_exit=arguments)
    return model, folder


@torch.no_grad()
def by_torch(model: ResidualStudent, assistants: int) -> np.ndarray:
    """z after so many assistants, from the unfused network, normalised a second way."""
    x = (IMAGES / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    x_NCHW = torch.from_numpy(x.transpose(0, 3, 1, 2)).float()
    maps = model.student_map(x_NCHW)
    for number in range(1, assistants + 1):
        maps = maps + model.assistant_map(x_NCHW, number)
    return model.head(maps.mean((2, 3))).numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def test_threshold_0_is_the_student_and_above_1_is_everything(bundle: tuple[ResidualStudent, Path]) -> None:
    model, folder = bundle
    k = len(model.assistants)
    with load(folder, exit_threshold=0) as alone, load(folder, exit_threshold=1.01) as every, load(folder) as whole:
        np.testing.assert_allclose(alone.logits(IMAGES), by_torch(model, 0), atol=1e-5)
        np.testing.assert_allclose(every.logits(IMAGES), whole.logits(IMAGES), atol=1e-5)
        np.testing.assert_allclose(every.logits(IMAGES), by_torch(model, k), atol=1e-5)
        assert alone.exits == (40, *[0] * k)
        assert every.exits == (*[0] * k, 80)
        assert whole.exits == ()
    assert np.abs(by_torch(model, 0) - by_torch(model, k)).max() > 0.05  # the assistants do matter


def test_each_image_of_a_mixed_batch_goes_its_own_way(bundle: tuple[ResidualStudent, Path]) -> None:
    model, folder = bundle
    z = [by_torch(model, i) for i in range(len(model.assistants) + 1)]
    threshold = float(np.sort(softmax(z[0]).max(1))[13:15].mean())  # between two images: nobody is on the edge
    expected, steps = [], []
    for image in range(len(IMAGES)):  # one image at a time, in plain Python
        step = 0
        while step < len(model.assistants) and softmax(z[step][[image]]).max() < threshold:
            step += 1
        steps.append(step)
        expected.append(z[step][image])
    assert steps.count(0) == 26
    with load(folder, exit_threshold=threshold) as classifier:
        np.testing.assert_allclose(classifier.logits(IMAGES), expected, atol=1e-5)
        assert list(classifier.exits) == [steps.count(step) for step in range(len(z))]
        singly = [classifier.predict(image)[0].label for image in IMAGES]
        assert singly == [LABELS[row.argmax()] for row in np.stack(expected)]
        assert sum(classifier.exits) == 80
    assert exit_steps(z, threshold).tolist() == steps


def test_the_report_counts_what_runs(bundle: tuple[ResidualStudent, Path]) -> None:
    model, folder = bundle
    report = json.loads((folder / "model.json").read_text())["early_exit"]
    k = len(model.assistants)
    assert report["files"] == ["student.onnx", *[f"assistant_{i}.onnx" for i in range(1, k + 1)]]
    branches = [model.student, *model.assistants]
    macs = [count(branch, 8).macs + branch.channels * len(LABELS) for branch in branches]  # adapters are folded away
    assert report["macs"] == macs
    z = np.stack([by_torch(model, i) for i in range(k + 1)])
    for name, part in (("held_out", slice(20)), ("test", slice(40))):
        for row in report[name]:
            steps = exit_steps(z[:, part], row["threshold"])
            assert row["shares"] == pytest.approx([(steps == step).mean() for step in range(k + 1)])
            mean = np.mean([sum(macs[: step + 1]) for step in steps])
            assert row["macs"] == pytest.approx(mean)
            assert row["saved"] == pytest.approx(1 - mean / sum(macs))
            right = z[steps, np.arange(40)[part]].argmax(1) == TRUTH[part]
            assert row["top1"] == pytest.approx(100 * right.mean())
    assert report["test"][0]["saved"] > 0 == report["test"][-1]["saved"]
    # The lowest that loses nothing on the held-out images.
    whole, grid = report["held_out"][-1]["top1"], np.arange(0, report["threshold"], 0.01)
    accuracy = [100 * (z[exit_steps(z[:, :20], t), np.arange(20)].argmax(1) == TRUTH[:20]).mean() for t in grid]
    assert all(value < whole for value in accuracy)
    assert report["test"][1]["threshold"] == report["threshold"]


def test_confidence_is_the_largest_probability() -> None:
    z = np.array([[1.0, 2.0, 3.0], [1e4, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(confidence(z), [np.exp(3) / np.exp([1, 2, 3]).sum(), 1, 1 / 3])


def test_what_cannot_leave_early_is_refused(tmp_path: Path, bundle: tuple[ResidualStudent, Path]) -> None:
    card, request = ModelCard(name="x", labels=LABELS, preprocess=PREPROCESS), EarlyExit(threshold=0.5)
    with pytest.raises(UsageError, match=r"this network is a StudentAlone: .*no second step"):
        export_bundle(StudentAlone(network_of(1)).eval(), card, tmp_path / "b", early_exit=request)
    with pytest.raises(UsageError, match=r"held out no images to choose it on"):
        export_bundle(network_of(1), card, tmp_path / "b", early_exit=EarlyExit())
    with pytest.raises(UsageError, match=r"exit_threshold = -0\.1 must be at least 0"):
        export_bundle(network_of(1), card, tmp_path / "b", early_exit=EarlyExit(threshold=-0.1))
    assert not (tmp_path / "b").exists()
    export_bundle(network_of(1), card, tmp_path / "plain")
    with pytest.raises(ModelFileError, match=r"no graphs for early exit.*--early-exit"):
        load(tmp_path / "plain", exit_threshold=0.5)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"must be at least 0"):
            load(bundle[1], exit_threshold=wrong)


@pytest.mark.parametrize("files", [["../student.onnx"], []])
def test_graphs_outside_of_the_folder_are_not_read(
    tmp_path: Path, bundle: tuple[ResidualStudent, Path], files: list[str]
) -> None:
    with load_early_exit(bundle[1], 0.5, "onnxruntime") as loaded:
        assert loaded.precision == "fp32"
    folder = shutil.copytree(bundle[1], tmp_path / "bundle")
    (folder / "student.onnx").rename(tmp_path / "student.onnx")
    card = json.loads((folder / "model.json").read_text())
    card["early_exit"]["files"] = files
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ModelFileError, match=r"which must be files beside it"):
        load_early_exit(folder, 0.5, "onnxruntime")


def test_a_branch_that_is_not_the_networks_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of the gate: b added by both branches, as if the head had not been split."""
    model = network_of(1)
    monkeypatch.setattr(early_exit.nn.init, "zeros_", lambda tensor: tensor)
    card = ModelCard(name="x", labels=LABELS, preprocess=PREPROCESS)
    request = EarlyExit(threshold=0.5, test=[(IMAGES, TRUTH)])
    with pytest.raises(GateError, match=r"the sums of the graphs for early exit against PyTorch"):
        export_bundle(model, card, tmp_path / "b", early_exit=request)
    assert not (tmp_path / "b").exists()


def test_a_card_without_it_is_read_as_before() -> None:
    card = ModelCard(name="x", labels=LABELS, preprocess=PREPROCESS)
    assert ModelCard.from_json(card.to_json(), "here") == card
    assert not card.early_exit
    with_it = dataclasses.replace(card, early_exit={"files": ["student.onnx"]})
    assert ModelCard.from_json(with_it.to_json(), "here") == with_it

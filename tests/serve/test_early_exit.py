"""Early exit: 0 is S alone, above 1 is S + A, and each image of a mixed batch goes its own way."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd_deploy import load
from rkd_deploy.backends.onnxrt import OnnxRuntimeBackend
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import GateError, ModelFileError, UsageError
from rkd_deploy.export import early_exit
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.early_exit import EarlyExit
from rkd_deploy.export.fusion import fuse_branch
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.stage_run import joined
from rkd_deploy.models.trunk import parted
from rkd_deploy.serve.early_exit import confidence, exit_steps, load_early_exit
from tests.support.adapters import learnt

LABELS = ("a", "b", "c", "d")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
IMAGES[::2] //= 5  # two kinds of images, so that S is not as sure of one as of the other
TRUTH = np.arange(40) % 4
PREPROCESS = Preprocess(height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def network_of(assistants: int, *, trunk: bool = False) -> ResidualStudent:
    torch.manual_seed(3)
    S = CifarResNet(8, (8, 8, 8, 12), None)
    chain = [CifarResNet(8, (8, 8, 8, 5) if trunk else (4, 4, 6, 5), None) for _ in range(assistants)]
    model = parted(S, chain, 2, 10, len(LABELS)) if trunk else ResidualStudent(S, chain, 10, len(LABELS))
    for adapter in model.assistant_adapters:
        learnt(adapter, std=0.5)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["branches", "trunk"])  # each export takes a second
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResidualStudent, Path]:
    """S with two assistants, exported: branches from the image on, and behind a trunk."""
    model = network_of(2, trunk=request.param == "trunk")
    folder = tmp_path_factory.mktemp("exits") / "bundle"
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
    # Each network counted whole, with its own share of the one matrix that adapters and head fold into; the trunk once.
    widths = [(8, 8, 8, 12), *[(4, 4, 6, 5) if model.trunk is None else (8, 8, 8, 5)] * k]
    macs = [count(CifarResNet(8, w, None), 8).macs + w[-1] * len(LABELS) for w in widths]
    if model.trunk is not None:
        macs[1:] = [value - count(model.trunk, 8).macs for value in macs[1:]]
    assert report["macs"] == macs
    assert sum(macs) == json.loads((folder / "model.json").read_text())["graph"]["macs"]
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
    assert report["threshold"] in [row["threshold"] for row in report["test"]]


def test_behind_a_trunk_only_what_s_leaves_unsure_goes_on(
    bundle: tuple[ResidualStudent, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = bundle
    taken: dict[str, list[tuple[int, ...]]] = {}

    class Counting(OnnxRuntimeBackend):
        def infer(self, x: np.ndarray) -> np.ndarray:
            assert self.info.file is not None
            taken.setdefault(self.info.file.name, []).append(x.shape)
            return super().infer(x)

    monkeypatch.setattr("rkd_deploy.backends.onnxrt.OnnxRuntimeBackend", Counting)
    z = [by_torch(model, i) for i in range(3)]
    threshold = float(np.sort(softmax(z[0]).max(1))[13:15].mean())
    with load_early_exit(folder, threshold, "onnxruntime") as loaded:
        loaded.infer(IMAGES)
    steps = exit_steps(z, threshold)
    shape = (8, 8, 3) if model.trunk is None else (8, 4, 4)  # an image, or the map that the trunk made of it
    for number in (1, 2):
        count_of_those = int((steps >= number).sum())
        assert taken.get(f"assistant_{number}.onnx", []) == ([(count_of_those, *shape)] if count_of_those else [])


def test_threads_share_one_classifier(bundle: tuple[ResidualStudent, Path]) -> None:
    with load(bundle[1], exit_threshold=0.5, threads=1) as classifier, ThreadPoolExecutor(4) as pool:
        expected = classifier.logits(IMAGES)
        left = classifier.exits
        for actual in pool.map(lambda _: classifier.logits(IMAGES), range(12)):
            np.testing.assert_allclose(actual, expected, atol=1e-6)
        assert classifier.exits == tuple(13 * count for count in left)


@torch.no_grad()
def test_the_parts_add_up_to_the_whole_in_float64() -> None:
    model = network_of(2, trunk=True).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z, trunk_map = fuse_branch(model, 0, model.head)(x)
    torch.testing.assert_close(z, StudentAlone(model)(x), atol=1e-10, rtol=0)
    no_bias = copy.deepcopy(model.head)
    torch.nn.init.zeros_(no_bias.bias)
    z = z + sum(fuse_branch(model, number, no_bias)(trunk_map) for number in (1, 2))
    torch.testing.assert_close(z, model(x), atol=1e-10, rtol=0)


def test_a_bundle_of_before_whose_graphs_run_the_trunk_each_is_read(tmp_path: Path) -> None:
    model = network_of(1, trunk=True)
    assert model.trunk is not None
    ends = [joined(model.trunk, end) for end in (model.student, *model.assistants)]  # type: ignore[arg-type]
    before = ResidualStudent(ends[0], ends[1:], 10, len(LABELS), model.head)
    before.student_adapter, before.assistant_adapters = model.student_adapter, model.assistant_adapters
    card = ModelCard(name="x", labels=LABELS, preprocess=PREPROCESS)
    export_bundle(before.eval(), card, tmp_path / "b", early_exit=EarlyExit(threshold=0.5))
    with load(tmp_path / "b", exit_threshold=1.01) as classifier:
        np.testing.assert_allclose(classifier.logits(IMAGES), by_torch(model, 1), atol=1e-5)


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

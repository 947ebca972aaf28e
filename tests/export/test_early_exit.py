"""Early exit in lower precision: what ships is judged, each partial sum of it, and the threshold is chosen by it."""

import copy
import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from rkd_deploy import load
from rkd_deploy.errors import GateError, UsageError
from rkd_deploy.export import early_exit
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.early_exit import EarlyExit, ExitGraphs
from rkd_deploy.export.precision.convert import convert_sum
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.proving import reference_of
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import StudentAlone
from rkd_deploy.models.trunk import parted
from rkd_deploy.serve.early_exit import exit_steps
from rkd_deploy.train.networks import load_part
from tests.support.adapters import learnt

FILES = ["student.onnx", "assistant_1.onnx"]


@pytest.fixture(scope="module")
def model(tiny_run):
    """S + A of the shared run."""
    return load_part(tiny_run, "fused").eval()


@pytest.fixture(scope="module")
def lowered(trained, model, tmp_path_factory):
    """The folder of a bundle in int8, and its card."""
    folder, observed = tmp_path_factory.mktemp("exits") / "bundle", trained.held_out
    request = EarlyExit(held_out=observed, test=[(observed[0][0][:100], observed[0][1][:100])])
    job = trained.job(precision="int8", agreement=50.0, drop=50.0)
    export_bundle(model, trained.card, folder, batches=request.test, early_exit=request, job=job)
    return folder, json.loads((folder / "model.json").read_text())


@torch.no_grad()
def by_torch(trained, model, x_NHWC):
    """z_0 and z_1 of the unfused network, normalised by hand."""
    preprocess = trained.card.preprocess
    scaled = (x_NHWC / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    x_NCHW = torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()
    return StudentAlone(model)(x_NCHW).numpy(), model(x_NCHW).numpy()


def by_files(folder, x_NHWC):
    parts = [onnxruntime.InferenceSession(folder / file).run(None, {"input": x_NHWC})[0] for file in FILES]
    return parts[0], parts[0] + parts[1]


def test_every_graph_is_lowered_and_every_partial_sum_judged(trained, model, lowered):
    folder, card = lowered
    x, labels = trained.held_out[0]
    for file in (*FILES, "model.onnx"):
        kinds = {node.op_type for node in onnx.load(folder / file).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds, file
    reported = card["early_exit"]["lowering"]
    assert (reported["precision"], reported["kept"], len(reported["steps"])) == ("int8", [], 2)
    assert reported["calibration"]["sha256"] == trained.calibration.sha256
    for actual, expected, step in zip(by_files(folder, x), by_torch(trained, model, x), reported["steps"], strict=True):
        assert step["images"] == len(x)
        assert step["agreement"] == pytest.approx(100 * (actual.argmax(1) == expected.argmax(1)).mean())
        assert step["top1"] == pytest.approx(100 * (actual.argmax(1) == labels).mean())
        assert step["max_abs_diff"] == pytest.approx(np.abs(actual - expected).max(), rel=1e-3)
        assert step["max_abs_diff"] > 1e-4  # it is not float32


def test_the_report_is_of_the_lowered_graphs(trained, lowered):
    folder, card = lowered
    x, labels = trained.held_out[0]
    z = np.stack(by_files(folder, x))
    for row in card["early_exit"]["held_out"]:
        steps = exit_steps(list(z), row["threshold"])
        assert row["shares"] == pytest.approx([(steps == 0).mean(), (steps == 1).mean()])
        assert row["top1"] == pytest.approx(100 * (z[steps, np.arange(len(x))].argmax(1) == labels).mean())
    with load(folder, exit_threshold=card["early_exit"]["threshold"]) as classifier:
        steps = exit_steps([part[:100] for part in z], card["early_exit"]["threshold"])
        np.testing.assert_allclose(classifier.logits(x[:100]), z[steps, np.arange(100)], atol=1e-4)


def test_a_sum_that_loses_too_much_stops_the_export(trained, model, tmp_path, monkeypatch):
    """The judge of the export: it holds the sums against the opposite of PyTorch's, which they are not."""
    opposite = lambda network, card: reference_of(nn.Sequential(network, Negative()), card)  # noqa: E731
    monkeypatch.setattr(early_exit, "reference_of", opposite)
    job = trained.job(precision="int8", agreement=50.0, drop=50.0)
    with pytest.raises(GateError, match=r"int8 loses too much: .*bundle\.report\.json"):
        export_bundle(model, trained.card, tmp_path / "bundle", early_exit=EarlyExit(threshold=0.5), job=job)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.report.json"]
    report = json.loads((tmp_path / "bundle.report.json").read_text())
    assert [step["passed"] for step in report["steps"]] == [False, False]


class Negative(nn.Module):
    def forward(self, x_NK):
        return -x_NK


@pytest.fixture(scope="module")
def branches(trained, model, lowered, tmp_path_factory):
    """The float32 graphs of S and A, and what PyTorch says of S alone and of both."""
    exits = ExitGraphs(tmp_path_factory.mktemp("float32"), model, trained.card, [trained.held_out[0]], 1e-4)
    references = [reference_of(one, trained.card) for one in (StudentAlone(model), model)]
    return exits.branches, [HeldOut(one, trained.held_out, trained.card) for one in references]


def calibrated(trained, branches):
    return [dataclasses.replace(branch, inputs=trained.calibration.images_NHWC) for branch in branches]


def test_s_alone_is_judged_though_the_whole_sum_passes(trained, branches):
    branches, (alone, whole) = branches

    def judged(held_out, limit):
        options = trained.job(precision="int8", agreement=limit, drop=100.0).options
        return convert_sum(calibrated(trained, branches), held_out, options)

    right, wrong = judged([alone, whole], 0.0), judged([whole, whole], 0.0)  # S held against itself, and against S + A
    limit = (min(one.agreement for one in right.results) + wrong.results[0].agreement) / 2
    assert wrong.results[0].agreement < limit - 2
    assert judged([alone, whole], limit).passed
    failed = judged([whole, whole], limit)
    assert [one.passed for one in failed.results] == [False, True]
    assert not failed.passed
    assert failed.result == failed.results[0]


def test_layers_are_sought_in_all_graphs_at_once(trained, model, tmp_path):
    """A hard to quantise, as in conftest.py's `uneven`: its layer is found, and S is quantised all the same."""
    uneven = copy.deepcopy(model)
    block = uneven.assistants[0].layer2[0]
    with torch.no_grad():
        uneven.assistant_adapters[0].norm.weight *= 10  # after two epochs A is faint: now it decides
        block.bn1.weight[0] *= 3000
        block.bn1.bias[0] *= 3000
        block.conv2.weight[:, 0] /= 3000
    references = [reference_of(network, trained.card) for network in (StudentAlone(uneven), uneven)]
    held_out = [HeldOut(reference, trained.held_out, trained.card) for reference in references]
    branches = ExitGraphs(tmp_path, uneven, trained.card, [trained.held_out[0]], 1e-2).branches
    options = trained.job(precision="int8", target="tensorrt", agreement=95.0, drop=100.0, keep=("auto",)).options
    actual = convert_sum(calibrated(trained, branches), held_out, options)
    assert actual.passed
    assert actual.float32_layers == ("branches.backbones.1.layer2.0.conv2",)
    assert next(iter(actual.sensitivities)) == actual.float32_layers[0]
    assert {name.split(".")[2] for name in actual.sensitivities if "backbones" in name} == {"0", "1"}


def test_a_layer_has_one_name_in_every_graph(trained, model, branches, tmp_path):
    branches, held_out = branches
    name = "branches.backbones.1.layer1.0.conv1"
    options = trained.job(precision="int8", agreement=0.0, drop=100.0, keep=(name,)).options
    S, A = convert_sum(calibrated(trained, branches), held_out, options).protos
    float32_tensors = {tensor.name for tensor in A.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert "network.branches.backbones.0.layer1.0.conv1.weight" in float32_tensors
    assert "network.branches.backbones.0.layer1.0.conv2.weight" not in float32_tensors
    assert "network.branches.backbones.0.layer1.0.conv1.weight" not in {one.name for one in S.graph.initializer}
    with pytest.raises(UsageError, match=r"names layers of level sum.*--fuse tail, or --keep auto"):
        export_bundle(
            model,
            trained.card,
            tmp_path / "bundle",
            level="sum",
            early_exit=EarlyExit(threshold=0.5),
            job=trained.job(precision="int8", keep=(name,)),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_behind_a_trunk_the_lowered_map_is_what_the_lowered_end_takes(trained, tmp_path, precision):
    """An end is calibrated on maps, whose range is not that of images; what is judged is the chain that ships."""
    torch.manual_seed(0)
    classes = len(trained.card.labels)
    S, A = (CifarResNet(8, (8, 8, 8, width), None) for width in (16, 8))
    model = parted(S, [A], 2, 12, classes)
    learnt(model.assistant_adapters[0], std=0.5)
    x, _ = trained.held_out[0]
    job = trained.job(precision=precision, agreement=50.0, drop=50.0)
    request = EarlyExit(threshold=0.5)
    export_bundle(model.eval(), trained.card, tmp_path / "bundle", early_exit=request, job=job)
    S, A = (onnxruntime.InferenceSession(tmp_path / "bundle" / file) for file in FILES)
    z_0, trunk_map = S.run(["logits", "trunk_map"], {"input": x})
    assert trunk_map.dtype == np.float32
    assert trunk_map.shape[1:] == (8, *(side // 2 for side in x.shape[1:3]))
    z_1 = z_0 + A.run(None, {"input": trunk_map})[0]
    steps = json.loads((tmp_path / "bundle" / "model.json").read_text())["early_exit"]["lowering"]["steps"]
    for actual, expected, step in zip((z_0, z_1), by_torch(trained, model, x), steps, strict=True):
        assert step["agreement"] == pytest.approx(100 * (actual.argmax(1) == expected.argmax(1)).mean())
        assert step["max_abs_diff"] == pytest.approx(np.abs(actual - expected).max(), rel=1e-3)
    with load(tmp_path / "bundle", exit_threshold=1.01) as classifier:
        np.testing.assert_allclose(classifier.logits(x), z_1, atol=1e-4)

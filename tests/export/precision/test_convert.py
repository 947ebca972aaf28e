"""Files of lower precision: what is in them, how they are judged, what is left where they fail."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper

from rkd_deploy.backends.files import with_checksums
from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench.parity import verify
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import CheckpointError, DataError, GateError, MissingDependencyError, ModelFileError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.precision.convert import convert, to_half
from rkd_deploy.export.precision.gate import HeldOut, _drop_interval
from rkd_deploy.export.precision.int8 import Int8Quantiser
from rkd_deploy.export.precision.options import Gates


def lowered(trained, **options):
    request = trained.job(**options)
    reference = PyTorchBackend(trained.graph, input_shape=(None, 8, 8, 3), input_dtype="uint8")
    held_out = HeldOut(reference, trained.held_out, trained.card)
    inputs = None if request.calibration is None else request.calibration.images_NHWC
    return convert(trained.graph, trained.proto, trained.card.preprocess, inputs, held_out, request.options)


def exported(trained, folder, **options):
    proof = export_bundle(trained.model, trained.card, folder, batches=trained.held_out, job=trained.job(**options))
    return proof, ModelCard.from_json((folder / "model.json").read_text(), "card")


def constants(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def preprocessing(proto):
    """Kinds of the nodes from the input on, up to the first one that quantises or belongs to the network."""
    reads = {node.input[0]: node for node in proto.graph.node}
    name, actual = proto.graph.input[0].name, []
    while (node := reads[name]).op_type in ("Cast", "Transpose", "Mul", "Add"):
        actual.append(node.op_type)
        name = node.output[0]
    return actual


def on_onnxruntime(proto, x):
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"input": x})[0]


def on_openvino(proto, x):
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}  # otherwise a CPU with bfloat16 computes in that
    return core.compile_model(core.read_model(proto.SerializeToString()), "CPU", settings)({0: x})[0].copy()


@pytest.mark.parametrize(("precision", "target"), [("fp16", "cpu"), ("bf16", "tensorrt"), ("int8", "cpu")])
def test_a_bundle_says_what_it_is_and_proves_itself(trained, tmp_path, precision, target):
    _, card = exported(trained, tmp_path / "bundle", precision=precision, target=target)
    assert (card.precision, card.lowering["target"]) == (precision, target)
    proto = onnx.load(tmp_path / "bundle/model.onnx")
    inside = replace(card, checksums={})  # a file cannot hold its own
    assert [entry.value for entry in proto.metadata_props] == [inside.to_json()]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    x, labels = trained.held_out[0]
    expected = trained.logits(x)
    actual = on_openvino(proto, x) if precision == "bf16" else on_onnxruntime(proto, x)
    gate = card.lowering["gate"]
    assert gate["images"] == len(x)
    assert gate["agreement"] == pytest.approx(100 * (actual.argmax(1) == expected.argmax(1)).mean())
    assert gate["top1"] == card.lowering["test_top1"] == pytest.approx(100 * (actual.argmax(1) == labels).mean())
    assert gate["max_abs_diff"] == pytest.approx(np.abs(actual - expected).max(), rel=1e-3)
    golden = np.load(tmp_path / "bundle/golden.npz")
    np.testing.assert_allclose(golden["logits"], actual[:8], atol=1e-5)
    np.testing.assert_allclose(golden["fp32_logits"], expected[:8], atol=1e-4)
    assert golden["tolerance"] == gate["max_abs_diff"] > 1e-4
    for backend in ("openvino",) if precision == "bf16" else ("onnxruntime", "openvino"):
        assert verify(tmp_path / "bundle", backend).passed, backend


@pytest.mark.parametrize(
    ("precision", "kind", "bits"), [("fp16", onnx.TensorProto.FLOAT16, 11), ("bf16", onnx.TensorProto.BFLOAT16, 8)]
)
def test_16_bits_for_the_network_and_float32_around_it(trained, precision, kind, bits):
    proto = lowered(trained, precision=precision, target="tensorrt").proto
    onnx.checker.check_model(proto, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types.pop("scale") == types.pop("shift") == onnx.TensorProto.FLOAT
    assert {kind for name, kind in types.items() if name.startswith("network.")} == {kind}
    assert preprocessing(proto) == ["Cast", "Transpose", "Mul", "Add", "Cast"]
    assert proto.graph.node[-1].op_type == "Cast"
    x = trained.held_out[0][0][:64]
    expected = trained.logits(x)
    difference = np.abs(on_openvino(proto, x) - expected).max() / np.abs(expected).max()
    assert 2.0 ** -(bits + 6) < difference < 2.0 ** -(bits - 4)  # rounded, and by no more than some layers of rounding


def test_fp16_refuses_a_weight_that_it_cannot_hold(trained):
    graph = trained.graph.in_dtype(torch.float32)  # a copy
    weight = next(tensor for name, tensor in graph.network.state_dict().items() if name.endswith("conv1.weight"))
    weight.view(-1)[0] = 1e5
    with pytest.raises(UsageError, match=r"ends at 65504, and conv1\.weight holds 100000.+bf16"):
        to_half(graph, trained.card.preprocess, "fp16")


def test_int8_for_tensorrt_has_no_zero_point_and_no_integer_bias(trained):
    """What TensorRT's parser takes: symmetric int8, Q/DQ before layers, float32 biases."""
    proto = lowered(trained, precision="int8", target="tensorrt").proto
    assert preprocessing(proto) == ["Cast", "Transpose", "Mul", "Add"]
    values = constants(proto)
    quantised = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in quantised:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    produced = {name: node for node in proto.graph.node for name in node.output}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == len([node for node in trained.proto.graph.node if node.op_type in ("Conv", "Gemm")])
    for node in layers:
        assert [produced[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert values[node.input[2]].dtype == np.float32
        scales = values[produced[node.input[1]].input[1]]
        assert len(scales) == len(values[node.input[2]])  # one for each output channel
    # Outputs of layers stay in float, so that activation and addition fuse with them.
    assert "Conv" not in {produced[node.input[0]].op_type for node in quantised if node.input[0] in produced}
    # What an addition reads was not rounded for the convolution beside it.
    sums = [node for node in proto.graph.node if node.op_type == "Add" and "scale" not in node.input]
    read = {produced[name].op_type for node in sums for name in node.input if name in produced}
    assert read <= {"Conv", "Relu", "Mul"}
    assert {"Conv", "Relu"} <= read


def test_int8_for_a_cpu_has_unsigned_activations_and_float_logits(trained):
    proto = lowered(trained, precision="int8", target="cpu").proto
    assert preprocessing(proto) == ["Cast", "Transpose", "Mul", "Add"]
    values = constants(proto)
    activations = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].dtype.name for node in activations} == {"uint8"}
    produced = {name: node for node in proto.graph.node for name in node.output}
    assert produced["logits"].op_type == "Gemm"
    assert "Relu" not in {node.op_type for node in proto.graph.node}  # a range that begins at 0 is one
    weights = [value for name, value in values.items() if name.endswith("weight_quantized")]
    assert {value.dtype.name for value in weights} == {"int8"}


def test_same_images_same_bytes(trained):
    first, second = (lowered(trained, precision="int8").proto for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_layer_named_is_kept_and_a_wrong_name_refused(trained):
    actual = lowered(trained, precision="int8", keep=("layer1.0.conv1",))
    assert actual.float32_layers == ("layer1.0.conv1",)
    values = constants(actual.proto)
    assert values["network.layer1.0.conv1.weight"].dtype == np.float32
    assert "network.layer1.0.conv2.weight" not in values
    with pytest.raises(UsageError, match=r"Unknown layer in --keep 'layer1.0.conv9'. Did you mean 'layer1"):
        lowered(trained, precision="int8", keep=("layer1.0.conv9",))


def test_auto_keeps_the_one_layer_that_ruins_the_network(uneven):
    options = {"precision": "int8", "target": "tensorrt", "agreement": 97.0}
    without, actual = lowered(uneven, **options), lowered(uneven, **options, keep=("auto",))
    assert not without.result.passed
    assert actual.result.passed
    assert actual.float32_layers == ("layer2.0.conv2",)
    assert next(iter(actual.sensitivities)) == "layer2.0.conv2"


def test_auto_keeps_nothing_where_nothing_hurts(trained):
    actual = lowered(trained, precision="int8", keep=("auto",))
    assert (actual.result.passed, actual.float32_layers, actual.sensitivities) == (True, (), None)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_with_every_layer_kept_nothing_is_quantised(trained, target):
    x = trained.calibration.images_NHWC
    with Int8Quantiser(trained.proto, x, target) as quantiser:
        proto = quantiser.quantised(without=list(quantiser.nodes.values()))
    np.testing.assert_allclose(on_onnxruntime(proto, x), trained.logits(x), atol=1e-4)


def test_a_failed_gate_leaves_its_report_and_nothing_else(uneven, tmp_path):
    with pytest.raises(
        GateError, match=r"int8 loses too much: .+Report: .+bundle\.report\.json.+--keep auto"
    ) as caught:
        exported(uneven, tmp_path / "bundle", precision="int8", target="tensorrt")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.report.json"]
    report = json.loads((tmp_path / "bundle.report.json").read_text())
    assert report["gate"]["passed"] is False
    assert report["gate"]["agreement"] < report["gate"]["min_agreement"] == 90.0
    assert report["calibration"]["images"] == 64
    assert report["calibration"]["sha256"] == uneven.calibration.sha256


def test_verify_notices_a_changed_file(trained, tmp_path):
    exported(trained, tmp_path / "bundle", precision="int8")
    proto = onnx.load(tmp_path / "bundle/model.onnx")
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("fc.weight_quantized"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    shutil.copytree(tmp_path / "bundle", tmp_path / "changed")
    onnx.save(proto, tmp_path / "changed/model.onnx")
    with pytest.raises(ModelFileError, match=r"model\.onnx"):
        verify(tmp_path / "changed", "onnxruntime")
    (tmp_path / "changed/model.json").unlink()
    with pytest.raises(ModelFileError, match="has no checksums"):
        verify(tmp_path / "changed", "onnxruntime")
    card = ModelCard.from_json((tmp_path / "bundle/model.json").read_text(), "model.json")
    (tmp_path / "changed/model.json").write_text(with_checksums(card, tmp_path / "changed"))
    for backend in ("onnxruntime", "openvino"):
        assert verify(tmp_path / "bundle", backend).passed
        assert not verify(tmp_path / "changed", backend).passed  # with sums that fit there is still the proof


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(model, card, tmp_path):
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.ndim == 4)[0, 0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"1 of the \d+ values of .+weight are NaN or infinite"):
        export_bundle(model, card, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_float32_program_beside_a_lower_file_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match=r"Leave one of --with-pytorch and --precision out"):
        export_bundle(
            trained.model,
            trained.card,
            tmp_path / "bundle",
            with_pytorch=True,
            job=trained.job(precision="fp16"),
        )


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1, 10], "labels go up to 10, and the card names 10 classes"), ([], "there are none")]
)
def test_held_out_images_of_other_classes_or_none_are_refused(trained, labels, message):
    reference = PyTorchBackend(trained.graph, input_shape=(None, 8, 8, 3), input_dtype="uint8")
    batches = [(trained.held_out[0][0][: len(labels)], np.array(labels))] if labels else []
    with pytest.raises(DataError, match=message):
        HeldOut(reference, batches, trained.card)


def test_unlabelled_images_are_judged_by_agreement_alone(trained):
    reference = PyTorchBackend(trained.graph, input_shape=(None, 8, 8, 3), input_dtype="uint8")
    x = trained.held_out[0][0][:50]
    held_out = HeldOut(reference, [(x, np.full(50, -1))], trained.card)
    reference_NK = held_out.logits_NK
    gates = trained.job(precision="int8", agreement=98.0).options.gates
    for changed, passes in ((1, True), (2, False)):
        actual = reference_NK.copy()
        actual[:changed] = -actual[:changed]
        judgement = held_out.judge(actual, gates)
        assert judgement.agreement == pytest.approx(100 - 2 * changed)
        assert (judgement.passed, judgement.drop) == (passes, None)
    assert not held_out.judge(np.full_like(reference_NK, np.nan), gates).passed


@pytest.mark.parametrize(
    ("limit", "lost", "passes"),
    [(0.0, 0, True), (0.0, 1, False), (0.1, 1, True), (0.1, 2, False), (5.0, 10, True), (5.0, 11, False)],
)
def test_a_drop_is_held_to_its_limit_in_whole_images(trained, limit, lost, passes):
    reference = PyTorchBackend(trained.graph, input_shape=(None, 8, 8, 3), input_dtype="uint8")
    x = trained.held_out[0][0][:200]
    right = trained.logits(x).argmax(1)
    held_out = HeldOut(reference, [(x, right)], trained.card)
    actual = held_out.logits_NK.copy()
    actual[:lost] = -actual[:lost]
    judgement = held_out.judge(actual, Gates(agreement=0, drop=limit))
    assert (judgement.reference_top1, judgement.drop) == (100.0, pytest.approx(lost / 2))
    assert judgement.passed == passes


def test_fp8_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    with pytest.raises(MissingDependencyError, match=r"modelopt.+pip install 'rkd-deploy\[quant\]'"):
        lowered(trained, precision="fp8", target="tensorrt")


def test_fp8_by_modelopt(trained):
    actual = lowered(trained, precision="fp8", target="tensorrt", keep=("layer1.0.conv1",), drop=2.0)
    assert actual.result.passed
    types = {tensor.data_type for tensor in actual.proto.graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in types
    assert preprocessing(actual.proto) == ["Cast", "Transpose", "Mul", "Add"]


def test_the_gate_says_its_limit_in_whole_images_and_the_interval_of_the_drop(trained):
    """0.5 points of 100 images are one image. The interval is (1.5 - 0.5 +- 1.96 sqrt(2 - 1 / 102)) / 102."""
    reference = PyTorchBackend(trained.graph, input_shape=(None, 8, 8, 3), input_dtype="uint8")
    x = trained.held_out[0][0][:100]
    labels = trained.logits(x).argmax(1)
    labels[:55] = (labels[:55] + 1) % 10
    held_out = HeldOut(reference, [(x, labels)], trained.card)
    actual = held_out.logits_NK.copy()
    actual[99] = -actual[99]
    judgement = held_out.judge(actual, Gates(agreement=90.0, drop=0.5))
    assert (judgement.passed, judgement.effective_agreement, judgement.effective_drop) == (True, 90.0, 1.0)
    assert judgement.in_words() == (
        "99.00 % of 100 held-out images keep their class (limit 90), top-1 45.00 -> 44.00 %: 1.00 points lost, 95 % "
        "interval -1.73 to 3.69 (limit 0.5 points, in whole images of 100 1.00)"
    )


def test_the_interval_of_a_drop_is_that_of_matched_proportions():
    """Agresti, Categorical Data Analysis, table 10.1: 150 and 86 of 1600 change; Wald's interval is 0.04 +- 0.0187."""
    before = np.repeat([True, True, False, False], [794, 150, 86, 570])
    after = np.repeat([True, False, True, False], [794, 150, 86, 570])
    assert _drop_interval(before, after) == pytest.approx((4 - 1.87, 4 + 1.87), abs=0.03)
    low, high = _drop_interval(before, before)
    assert low < 0 < high

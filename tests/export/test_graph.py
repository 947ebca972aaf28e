"""The ONNX file: what is in it, and that two engines that are not PyTorch answer as PyTorch does."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from rkd_deploy.card import METADATA_KEY, ModelCard, Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, append_card, fast_exporter, stamp, to_onnx


def images(batch):
    return np.random.default_rng(batch).integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8)


def normalised(x_NHWC, card):
    mean, std = np.array(card.preprocess.mean), np.array(card.preprocess.std)
    return ((x_NHWC / 255 - mean) / std).transpose(0, 3, 1, 2)


def expected_logits(model, x_NHWC, card):
    """In float64, with the pre-processing done by NumPy."""
    with torch.no_grad():
        return model.double()(torch.from_numpy(normalised(x_NHWC, card))).numpy()


@pytest.mark.parametrize("batch", [1, 3])
def test_two_engines_answer_as_pytorch_does(model, card, proto, batch):
    x = images(batch)
    expected = expected_logits(model, x, card)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"input": x})[0], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ReferenceEvaluator(proto).run(["logits"], {"input": x})[0], expected, rtol=0, atol=1e-4)


def test_opset_one_file_dynamic_batch(proto):
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [18]
    assert all(not tensor.external_data for tensor in proto.graph.initializer)
    (given,), (logits,) = proto.graph.input, proto.graph.output
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 8, 8, 3]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 5]


def test_nothing_is_left_to_fold(proto):
    """Two branches of 9 convolutions (7 of depth 8 and 2 shortcuts), 7 ReLUs and 3 additions each, and one tail."""
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("BatchNormalization") == 0
    assert kinds.count("Conv") == 2 * 9
    assert kinds.count("Relu") == 2 * 7
    assert kinds.count("Gemm") == 1
    assert kinds[:2] == ["Cast", "Transpose"]  # TensorRT transposes no uint8


def test_the_file_names_no_path_of_the_machine(proto):
    assert b"/rkd_deploy/" not in proto.SerializeToString()
    assert b"site-packages" not in proto.SerializeToString()


def test_probabilities_and_features(model, card):
    graph = ExportGraph(fuse(model, "sum"), card.preprocess, ("logits", "probabilities", "features"))
    session = onnxruntime.InferenceSession(to_onnx(graph, card.preprocess).SerializeToString())
    x = images(3)
    logits, probabilities, features = session.run(None, {"input": x})
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(1, keepdims=True), atol=1e-6)
    with torch.no_grad():
        x_NCHW = torch.from_numpy(normalised(x, card)).float()
        f_S = model.student_adapter(model.student.features(x_NCHW)[-1])
        f_A = model.assistant_map(x_NCHW)
    np.testing.assert_allclose(features, (f_S + f_A).numpy(), atol=1e-4)


def test_float32_input_takes_normalised_images(model, card):
    from dataclasses import replace

    preprocess = replace(card.preprocess, embedded=False)
    proto = to_onnx(ExportGraph(fuse(model), preprocess), preprocess)
    x = images(2)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = session.run(None, {"input": normalised(x, card).astype(np.float32)})[0]
    np.testing.assert_allclose(found, expected_logits(model, x, card), atol=1e-4)


def test_features_of_a_folded_tail_are_refused(model, card):
    with pytest.raises(UsageError, match="--fuse sum"):
        ExportGraph(fuse(model, "tail"), card.preprocess, ("logits", "features"))


@pytest.mark.parametrize("outputs", [("probabilities",), ("logits", "logits"), ("logit",)])
def test_impossible_outputs_are_refused(model, card, outputs):
    with pytest.raises(UsageError, match="logits"):
        ExportGraph(fuse(model), card.preprocess, outputs)


def test_the_card_is_in_the_metadata_once(proto, card):
    proto = copy.deepcopy(proto)
    stamp(proto, card)
    stamp(proto, card)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = session.get_modelmeta().custom_metadata_map
    assert list(found) == [METADATA_KEY]
    assert ModelCard.from_json(found[METADATA_KEY], "test") == card


FLOATS = Preprocess(height=4, width=4, mean=(0.5,) * 3, std=(0.5,) * 3, embedded=False)


class Shortcut(nn.Module):
    """x + relu(x), or 2 relu(x) where the activation overwrites what the shortcut reads."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=inplace), nn.Linear(3, 5)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        shifted = x_NCHW + 0.1
        activated = self.act(shifted)
        return self.fc((shifted + activated).mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_that_overwrites_what_is_read_again_is_exported_as_it_is(inplace):
    network = Shortcut(inplace=inplace).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = network(x.clone()).detach().numpy()
    proto = to_onnx(ExportGraph(network, FLOATS), FLOATS)
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(["logits"], {"input": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert network.act.inplace is inplace


def test_activations_overwrite_again_afterwards_and_not_meanwhile():
    network = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)).eval()
    with fast_exporter(network, torch.randn(1, 3, 4, 4)):
        assert network[1].inplace is False
    assert network[1].inplace is True


def test_an_appended_card_is_what_every_reader_finds(model, card, tmp_path):
    preprocess = card.preprocess
    proto = to_onnx(ExportGraph(model, preprocess), preprocess)
    del proto.metadata_props[:]
    file = tmp_path / "model.onnx"
    before = proto.SerializeToString(deterministic=True)
    file.write_bytes(before)
    append_card(file, card)
    read = onnx.load(file)
    assert [entry.key for entry in read.metadata_props] == [METADATA_KEY]
    assert onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map == {METADATA_KEY: card.to_json()}
    del read.metadata_props[:]
    assert read.SerializeToString(deterministic=True) == before

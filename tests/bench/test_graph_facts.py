"""What an exported file multiplies and stores, against closed forms and what the layout of S and A adds."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from rkd_deploy.backends import describe_model
from rkd_deploy.bench.graph_cost import graph_facts
from rkd_deploy.card import GraphFacts, ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.report.columns import graph_macs, graph_weights


def written(path, operator="Conv", domain=""):
    """A 3x3 convolution of 2 to 4 channels on 5 x 6 images; half of its weights are zero."""
    weights = [0.0, 1.0] * (4 * 2 * 9 // 2)
    node = helper.make_node(operator, ["x", "w", "b"], ["y"], domain=domain, kernel_shape=[3, 3])
    constants = [
        helper.make_tensor("w", TensorProto.FLOAT, [4, 2, 3, 3], weights),
        helper.make_tensor("b", TensorProto.FLOAT, [4], [0.0, 1.0, 2.0, 3.0]),
        helper.make_tensor("shape", TensorProto.INT64, [2], [0, 0]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.0]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 5, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid(name, 18) for name in {"", domain}]), path)
    return path


def test_a_convolution_by_its_closed_form(tmp_path):
    # 3 x 4 positions, 4 outputs, windows of 2 x 9; the bias is stored, shapes and single numbers are no weights.
    assert graph_facts(written(tmp_path / "m.onnx")) == GraphFacts(macs=3 * 4 * 4 * 18, weights=72 + 4, zeros=36 + 1)


def test_what_cannot_be_counted_is_not_guessed(tmp_path):
    assert graph_facts(written(tmp_path / "m.onnx", "Unknown", "somebody.else")) is None


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """One S + A that lie side by side, exported as one network and as two branches."""
    torch.manual_seed(0)
    separation = separate("resnet8", num_classes=5, input_size=32, layout="side_by_side")
    model = ResidualStudent(separation.student, separation.assistants, 64, 5).eval()
    cost = count(model, 32)
    preprocess = Preprocess(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    card = ModelCard(name="x", labels=tuple("abcde"), preprocess=preprocess, macs=cost.macs, parameters=cost.parameters)
    folder = tmp_path_factory.mktemp("bundles")
    for level in ("wide", "tail"):
        export_bundle(model, card, folder / level, level=level)
    return folder


def test_a_merged_network_stores_the_zeros_between_its_branches(bundles):
    wide, tail = (describe_model(bundles / level) for level in ("wide", "tail"))
    assert (wide.macs, wide.parameters) == (tail.macs, tail.parameters)  # what was trained
    # What the merged layers have more than the two branches is zeros, and all of it is multiplied.
    assert wide.graph.weights - tail.graph.weights == wide.graph.zeros - tail.graph.zeros > 0.3 * wide.graph.weights
    assert wide.graph.macs > 1.5 * wide.macs > tail.graph.macs
    assert graph_facts(bundles / "wide") == wide.graph
    shown = graph_weights(wide.parameters, wide.graph.weights, wide.graph.zeros)
    assert shown == f"{wide.graph.weights / 1e6:.3f} ({wide.graph.zeros / wide.graph.weights:.0%})"
    assert graph_macs(wide.macs, wide.graph.macs) == f"{wide.graph.macs / 1e6:.2f}"


def test_tables_say_nothing_where_a_graph_does_what_was_trained():
    assert graph_macs(1_000_000, 1_010_000) is None
    assert graph_weights(1_000_000, 990_000, 0) is None
    assert graph_macs(None, 1) is None
    assert graph_macs(1, None) is None


def test_older_cards_still_load(bundles):
    content = json.loads((bundles / "wide" / "model.json").read_text())
    del content["graph"]
    assert ModelCard.from_json(json.dumps(content), "model.json").graph is None

"""The opset of a file, against onnx's own reader."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from rkd_deploy.backends.onnx_bytes import opset


def write(path, *imports, weights=0, last=False):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    constants = [helper.make_tensor("w", TensorProto.FLOAT, [weights], [0.5] * weights)]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*entry) for entry in imports])
    content = model.SerializeToString()
    if last:  # protobuf leaves the order of fields to the writer
        alone = onnx.ModelProto(opset_import=model.opset_import).SerializeToString()
        model.ClearField("opset_import")
        content = model.SerializeToString() + alone
    path.write_bytes(content)
    assert {(entry.domain, entry.version) for entry in onnx.load(path).opset_import} == set(imports)
    return path


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("imports", "version"),
    [
        ([("", 18)], 18),
        ([("", 300)], 300),
        ([("com.microsoft", 99), ("", 21), ("ai.onnx.ml", 40)], 21),
        ([("ai.onnx", 22), ("", 7)], 22),
        ([("com.microsoft", 1)], 0),
    ],
)
def test_it_is_what_onnx_reads(imports, version, last, tmp_path):
    for weights in (0, 50_000):
        assert opset(write(tmp_path / "m.onnx", *imports, weights=weights, last=last)) == version

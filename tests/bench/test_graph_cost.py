"""MACs and bytes of graphs, against closed forms written out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkd_deploy.bench.graph_cost import graph_cost, macs
from rkd_deploy.errors import ModelFileError, UsageError


@pytest.fixture
def write(tmp_path):
    """Writes a model from nodes and weights, its input [batch, *image]."""

    def written(nodes, weights, image=(3, 8, 8), batch="batch", dtype=np.float32):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        constants = [numpy_helper.from_array(np.zeros(shape, dtype), name) for name, shape in weights.items()]
        ends = [helper.make_tensor_value_info("x", kind, [batch, *image])]
        ends += [helper.make_tensor_value_info("y", kind, None)]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return written


def test_a_convolution_a_pool_and_a_product(write):
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "a"], ["y"], transB=1),
    ]
    file = write(nodes, {"w": (16, 3, 3, 3), "b": (16,), "v": (10, 16), "a": (10,)})
    for n in (1, 5):
        cost = graph_cost(file, n)
        assert cost.macs == n * (16 * 4 * 4 * 3 * 3 * 3 + 16 * 10)
        assert cost.input_bytes == 4 * n * 3 * 8 * 8
        assert cost.output_bytes == 4 * n * 10
        assert cost.weight_bytes == 4 * (16 * 27 + 16 + 160 + 10)
        assert cost.least_bytes == cost.weight_bytes + cost.input_bytes + cost.output_bytes
        # Conv reads x, w, b and writes c; the pool reads c and writes p; Flatten moves nothing; Gemm the rest.
        moved = n * (3 * 64 + 2 * 16 * 16 + 16 + 16 + 10) + 16 * 27 + 16 + 160 + 10
        assert cost.unfused_bytes == 4 * moved
        assert cost.arithmetic == "float32"
        assert cost.uncounted == ()


def test_groups_transposed_convolutions_and_transposed_products(write):
    depthwise = write([helper.make_node("Conv", ["x", "w"], ["y"], group=3)], {"w": (3, 1, 3, 3)})
    assert graph_cost(depthwise, 2).macs == 2 * 3 * 6 * 6 * 9
    up = write([helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])], {"w": (3, 5, 2, 2)})
    assert graph_cost(up, 2).macs == 2 * 3 * 8 * 8 * 5 * 2 * 2
    assert macs("Gemm", (7, 3), (7, 2), (3, 2), transposed=True) == 3 * 2 * 7
    batched = write([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (8, 6)})
    assert graph_cost(batched, 2).macs == 2 * 3 * 8 * 6 * 8


def test_a_network_counts_as_torch_counts_it(tmp_path):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, groups=8, dilation=2),
        torch.nn.Conv2d(8, 12, (1, 3), groups=2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 7),
    ).eval()
    x = torch.zeros(2, 3, 17, 20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", external_data=False, opset_version=18, verbose=False)
    assert 2 * graph_cost(tmp_path / "net.onnx", 2).macs == counter.get_total_flops()


def test_halves_and_quantised_graphs_are_told_apart(write):
    half = write([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": (4, 3, 1, 1)}, dtype=np.float16)
    assert graph_cost(half, 1).arithmetic == "float16"
    assert graph_cost(half, 1).weight_bytes == 2 * 12
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])
    nodes = [
        helper.make_node("Constant", [], ["s"], value=scale),
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("QuantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("DequantizeLinear", ["v", "s"], ["u"]),
        helper.make_node("Conv", ["d", "u"], ["c"]),
        helper.make_node("Conv", ["c", "k"], ["y"]),  # one that was left in float32
    ]
    quantised = graph_cost(write(nodes, {"w": (4, 3, 1, 1), "k": (2, 4, 1, 1)}), 1)
    assert quantised.arithmetic == "int8"
    assert quantised.macs_in == {"int8": 4 * 3 * 64, "float32": 2 * 4 * 64}
    assert quantised.macs == (4 * 3 + 2 * 4) * 64


def test_what_cannot_be_counted_is_named(write):
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], equation="nchw,wk->nchk")]
    cost = graph_cost(write(nodes, {"w": (8, 2)}), 1)
    assert cost.uncounted == ("Einsum",)
    assert cost.macs == 0


def test_what_has_no_known_size_is_refused(write, tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    free = write(nodes, {"w": (4, 3, 1, 1)}, image=(3, "h", "w"))
    with pytest.raises(UsageError, match="leaves the size of its images open"):
        graph_cost(free, 1)
    assert graph_cost(free, 1, (3, 8, 8)).macs == 4 * 3 * 64
    fixed = write(nodes, {"w": (4, 3, 1, 1)}, batch=4)
    with pytest.raises(UsageError, match="takes 4 images at a time, and not 1"):
        graph_cost(fixed, 1)
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(ModelFileError, match="cannot be loaded as a model"):
        graph_cost(tmp_path / "model.onnx", 1)

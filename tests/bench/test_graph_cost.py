"""MACs and bytes of graphs, against closed forms written out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
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
        opsets = [helper.make_opsetid(domain, 1) for domain in {node.domain for node in nodes} if domain]
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), *opsets], ir_version=10)
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


@pytest.mark.parametrize(
    ("equation", "weight", "macs"),
    [
        ("nchw,wk->nchk", (8, 2), 3 * 8 * 8 * 2),
        ("nchw,cd->nhwd", (3, 5), 3 * 8 * 8 * 5),
        ("nchw, nchw -> nc", (1, 3, 8, 8), 3 * 8 * 8),
        ("...hw,wk->...hk", (8, 2), 3 * 8 * 8 * 2),
        ("...w,...wk", (3, 8, 8, 4), 3 * 8 * 8 * 4),
    ],
)
def test_an_einsum_is_as_many_products_as_its_indices_have_combinations(equation, weight, macs, write):
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)]
    cost = graph_cost(write(nodes, {"w": weight}), 1)
    assert (cost.macs, cost.uncounted) == (macs, ())


def test_what_cannot_be_counted_is_named(write):
    three = helper.make_node("Einsum", ["x", "w", "w"], ["y"], equation="nchw,wk,wk->nchk")
    assert graph_cost(write([three], {"w": (8, 2)}), 1).uncounted == ("Einsum",)
    for op, domain in (("MatMulNBits", "com.microsoft"), ("TreeEnsemble", "ai.onnx.ml"), ("Mine", "my.domain")):
        cost = graph_cost(write([helper.make_node(op, ["x", "w"], ["y"], domain=domain)], {"w": (8, 2)}), 1)
        assert cost.uncounted == (op,)
        assert cost.macs == 0


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Convolutions, grouped and not, an addition, pools and a head; and its multiply-adds for one image, by hand."""
    import torch

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
            self.left = torch.nn.Conv2d(16, 24, 3, stride=2, padding=1)
            self.right = torch.nn.Conv2d(16, 24, 1, stride=2)
            self.each = torch.nn.Conv2d(24, 24, 3, padding=1, groups=24)
            self.head = torch.nn.Linear(24, 10)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(self.left(x) + self.right(x))
            return self.head(torch.relu(self.each(x)).mean((2, 3)))

    file = tmp_path_factory.mktemp("network") / "fp32.onnx"
    torch.manual_seed(0)
    x = torch.zeros(1, 3, 16, 16)
    torch.onnx.export(Small().eval(), (x,), file, external_data=False, opset_version=18, verbose=False)
    products = 16 * 256 * 27 + 24 * 64 * 16 * 9 + 24 * 64 * 16 + 24 * 64 * 9 + 24 * 10
    return file, products


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED", "ALL"])
def test_a_file_that_onnx_runtime_optimised_costs_what_it_cost_before(level, network, tmp_path):
    """Optimised, the convolutions are FusedConv, or nchwc's Conv on a CPU that has blocks of channels for it."""
    file, products = network
    assert graph_cost(file, 1).macs == products
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    cost = graph_cost(tmp_path / "optimised.onnx", 1)
    assert cost.uncounted == ()
    domains = {node.domain for node in onnx.load(tmp_path / "optimised.onnx").graph.node} - {"", "ai.onnx"}
    assert bool(domains) == (level != "BASIC")
    if "com.microsoft.nchwc" in domains:  # channels are filled up to blocks, and what fills them is multiplied, too
        assert products <= cost.macs < 2 * products
    else:
        assert cost.macs == products


@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
@pytest.mark.parametrize("optimised", [False, True])
def test_a_quantised_file_costs_as_many_products_in_int8(form, optimised, network, tmp_path):
    """QLinearConv, QGemm, ConvInteger and MatMulInteger, and what ONNX Runtime makes of each of them."""
    from onnxruntime import quantization

    class Noise(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}]

        def get_next(self):
            return self.left.pop() if self.left else None

    file, products = network
    if form == "dynamic":
        quantization.quantize_dynamic(file, tmp_path / "int8.onnx")
    else:
        quantization.quantize_static(
            file, tmp_path / "int8.onnx", Noise(), quant_format=quantization.QuantFormat[form], per_channel=False
        )
    measured = tmp_path / "int8.onnx"
    if optimised:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(measured := tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(tmp_path / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    cost = graph_cost(measured, 1)
    assert cost.uncounted == ()
    assert cost.macs == products
    assert cost.macs_in.get("int8", 0) > 0.9 * products


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

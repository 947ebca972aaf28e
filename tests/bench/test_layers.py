"""Times of layers: from a profile written by hand, and of models whose layers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rkd_deploy.backends import RunOn, load_backend
from rkd_deploy.backends.onnxrt_session import read_profile
from rkd_deploy.backends.protocol import LayerTime
from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench.layers import LayerMedian, _medians, layer_times


def kernel(name, index, us, op="Conv"):
    facts = {"node_index": index, "op_name": op, "input_type_shape": [{"float": [1, 3]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": facts}


def test_a_profile_is_cut_into_runs_and_its_medians_taken():
    events = [{"cat": "Session", "name": "model_run", "dur": 9, "args": {}}]
    for us in (10, 30, 20):
        fence = {"cat": "Node", "name": "a_fence_before", "dur": 5, "args": {"node_index": "0"}}
        events += [fence, kernel("a", "0", us), kernel("", "1", 2 * us, "Relu"), kernel("a", "2", us)]
    runs = read_profile(events)
    a = LayerTime("a", "Conv", 0.01, "float32")
    assert runs[0] == [a, LayerTime("Relu 1", "Relu", 0.02, "float32"), a]
    assert len(runs) == 3
    # Two nodes of one name and type are one line of the table: their time in a run is that of both.
    assert _medians(runs) == (LayerMedian("a", "Conv", 0.04, "float32"), LayerMedian("Relu 1", "Relu", 0.04, "float32"))


@pytest.fixture(scope="module")
def two_convolutions(zoo, tmp_path_factory):
    """A small convolution and one with 64 times its work."""
    generator = np.random.default_rng(0)
    weights = {"w": (8, 8, 1, 1), "v": (512, 8, 1, 1)}
    constants = [
        numpy_helper.from_array(generator.standard_normal(shape, np.float32), name) for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="small"),
        helper.make_node("Sigmoid", ["c"], ["s"], name="bend"),
        helper.make_node("Conv", ["s", "v"], ["y"], name="large"),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 32, 32])]
    ends += [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 512, 32, 32])]
    file = tmp_path_factory.mktemp("layers") / "two.onnx"
    zoo.save(file, helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    return file


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_layer_with_most_to_do_takes_longest(two_convolutions, backend):
    (times,) = layer_times([two_convolutions], RunOn(backend, threads=1), batch=2)
    assert (times.model, times.backend, times.device, times.batch, times.threads) == ("two", backend, "cpu", 2, 1)
    assert times.runs == 30
    products = [layer for layer in times.layers if layer.op.startswith("Conv")]
    assert len(products) == 2
    assert products[1].ms > products[0].ms > 0
    assert {layer.precision for layer in products} == {"float32"}
    assert times.to_record()["layers"][0].keys() == {"name", "op", "ms", "precision"}


def test_pytorch_names_the_operators_of_an_exported_program(tmp_path):
    layers = [torch.nn.Conv2d(8, 8, 1), torch.nn.Sigmoid(), torch.nn.Conv2d(8, 512, 1)]
    network = torch.nn.Sequential(*layers).eval()
    program = torch.export.export(network, (torch.zeros(2, 8, 32, 32),))
    torch.export.save(program, tmp_path / "model.pt2")
    (tmp_path / "model.onnx").write_bytes(b"beside it")
    (times,) = layer_times([tmp_path], RunOn("pytorch", threads=1), batch=2)
    assert [(layer.op, layer.precision) for layer in times.layers] == [
        ("conv2d", "float32"),
        ("sigmoid", "float32"),
        ("conv2d", "float32"),
    ]
    assert len({layer.name for layer in times.layers}) == 3
    assert times.layers[2].ms > times.layers[0].ms > 0
    alive = PyTorchBackend(network, input_shape=(None, 8, 32, 32), input_dtype="float32")
    assert alive.layer_runs(np.zeros((1, 8, 32, 32), np.float32), 2) == []  # a live module has no operators to name


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_tells_the_layers_of_the_engine_that_was_measured(flavour, gpu, zoo, tmp_path):
    model, run_on = zoo.build(tmp_path / "m.onnx", card=zoo.card()), RunOn(flavour)
    load_backend(flavour, model, batches=[4, 16]).close()
    gpu.device.log.clear()
    (times,) = layer_times([model], run_on, batch=4, batches=[4, 16])
    assert (times.device, times.batch, times.runs) == ("cuda:0", 4, 30)
    assert times.layers == (
        LayerMedian(
            "fused Cast+ReduceSum+Mul+Add", "x", 1.0, None
        ),  # the simulated device takes 0.25 ms for each input
        LayerMedian("Cast", "cast", 2.0, "FP32"),
    )
    calls = [entry[0] if isinstance(entry, tuple) else entry for entry in gpu.device.log]
    assert "build" not in calls  # the engine is the one from the cache
    assert not {"GraphLaunch", "StreamBeginCapture"} & {*calls}


def test_backends_without_it_give_none(bundle, graphs):
    for backend in ("pytorch:compile", "pytorch:cuda-graphs"):
        assert layer_times([bundle], RunOn(backend)) == []


def lowered(zoo, path, kind):
    """A convolution of 32 channels in float16, or quantised at both ends."""
    weight, shape = np.random.default_rng(0).standard_normal((32, 32, 3, 3), np.float32), ["batch", 32, 16, 16]
    if kind == "float16":
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c", pads=[1] * 4)]
        constants, end = {"w": weight.astype(np.float16)}, TensorProto.FLOAT16
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "s", "n"], ["v"]),
            helper.make_node("Conv", ["d", "v"], ["c"], name="c", pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["r"]),
            helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
        ]
        constants = {"w": (10 * weight).astype(np.int8), "s": np.float32(0.05), "z": np.uint8(128), "n": np.int8(0)}
        end = TensorProto.FLOAT
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, end, shape) for name in "xy"]
    zoo.save(path, helper.make_graph(nodes, "g", ends[:1], ends[1:], stored))
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kind", "reported"), [("float16", {"float32", "float16"}), ("int8", {"uint8", "int8"})])
def test_files_of_lower_precision_say_what_their_layers_really_work_on(kind, reported, backend, zoo, tmp_path):
    (times,) = layer_times([lowered(zoo, tmp_path / "m.onnx", kind)], RunOn(backend, threads=1), batch=2)
    (product,) = [layer for layer in times.layers if layer.op in ("Conv", "Convolution", "QLinearConv")]
    assert product.ms > 0
    assert product.precision in reported

"""Times of layers: a profile written by hand, and what the runtimes say of a model whose layers are known."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkd_deploy.serve.bench.layers import Layer, _medians, layer_times, read_profile


def kernel(name, index, us, op="Conv"):
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"node_index": index, "op_name": op}}


def test_a_profile_is_cut_into_runs_and_its_medians_taken():
    events = [{"cat": "Session", "name": "model_run", "dur": 9, "args": {}}]
    for us in (10, 30, 20):
        fence = {"cat": "Node", "name": "a_fence_before", "dur": 5, "args": {"node_index": "0"}}
        events += [fence, kernel("a", "0", us), kernel("", "1", 2 * us, "Relu"), kernel("a", "2", us)]
    runs = read_profile(events)
    assert runs[0] == [Layer("a", "Conv", 0.01), Layer("Relu 1", "Relu", 0.02), Layer("a", "Conv", 0.01)]
    assert len(runs) == 3
    # Two nodes of one name and type are one line of the table: their time in a run is that of both.
    assert _medians(runs) == (Layer("a", "Conv", 0.04), Layer("Relu 1", "Relu", 0.04))


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
    (times,) = layer_times([two_convolutions], backend=backend, batch=2, threads=1)
    assert (times.model, times.backend, times.batch, times.threads) == ("two", backend, 2, 1)
    assert times.runs == 30
    products = [layer for layer in times.layers if layer.op.startswith("Conv")]
    assert len(products) == 2
    assert products[1].ms > products[0].ms > 0
    assert times.to_record()["layers"][0].keys() == {"name", "op", "ms"}


def test_backends_without_it_give_none(two_convolutions):
    assert layer_times([two_convolutions], backend="pytorch") == []
    assert layer_times([two_convolutions], backend="onnxruntime", device="cuda") == []

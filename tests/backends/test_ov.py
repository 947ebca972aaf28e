"""What only OpenVINO's backend does: inputs that stay, opsets that it does not know."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from onnx import TensorProto, helper

from rkd_deploy.backends import load_backend
from rkd_deploy.backends.ov import newest_opset
from rkd_deploy.errors import BackendError


def test_a_prepared_run_outlives_the_array_it_was_prepared_with(zoo, tmp_path):
    with load_backend("openvino", zoo.build(tmp_path / "m.onnx"), threads=1) as backend:
        x = zoo.pixels(3)
        run = backend.prepare(x)
        x[...] = 0
        del x
        others = [np.full((3, 4, 4, 3), 255, np.uint8) for _ in range(1000)]  # take the freed memory, if it was freed
        run()
        request = inspect.getclosurevars(run).nonlocals["request"]
        np.testing.assert_array_equal(request.get_output_tensor(0).data, zoo.answer(zoo.pixels(3)))
        assert len(others) == 1000


def test_the_newest_opset_runs_and_the_one_after_it_is_refused(zoo, tmp_path):
    newest = newest_opset()
    assert newest >= 21
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    for version in (newest, newest + 1):
        zoo.save(tmp_path / f"{version}.onnx", graph, opset=version)
    with load_backend("openvino", tmp_path / f"{newest}.onnx", threads=1) as backend:
        x = np.array([[-1, 0, 2]], np.float32)
        np.testing.assert_array_equal(backend.infer(x), [[0, 0, 2]])
    with pytest.raises(BackendError, match=rf"opset {newest + 1}, and OpenVINO .* up to opset {newest}"):
        load_backend("openvino", tmp_path / f"{newest + 1}.onnx")


def test_an_empty_result_is_an_error_in_either_kind_of_run(zoo, tmp_path):
    """OpenVINO 2026.4 gives one, and no error, for some models that need more memory than there is."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    ends += [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "k"])]
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [1]) for name in "sea"]
    graph = helper.make_graph([helper.make_node("Slice", ["x", *"sea"], ["y"])], "g", ends[:1], ends[1:], constants)
    zoo.save(tmp_path / "m.onnx", graph)
    x = np.ones((2, 3), np.float32)
    with load_backend("openvino", tmp_path / "m.onnx", threads=1) as backend:
        for run in (lambda: backend.infer(x), backend.prepare(x)):
            with pytest.raises(BackendError, match=r"empty result \[2, 0\] for a batch of 2.*smaller batch"):
                run()

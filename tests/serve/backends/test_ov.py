"""What only OpenVINO's backend does: a prepared run keeps its input in memory of its own."""

from __future__ import annotations

import inspect

import numpy as np

from rkd_deploy.serve.backends import load_backend


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

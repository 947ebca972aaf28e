"""Model repositories of tests: the name of their model, their files, models that are hard to serve."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

NAME = "tiny-s-a"


# An editable install puts the package on the path, or finds it by a finder of its own.
HIDING = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import pathlib
sys.path[:] = [place for place in sys.path if not (pathlib.Path(place) / "rkd_deploy/cli.py").exists()]
"""


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(path, shapes, dtype=TensorProto.FLOAT):
    """An ONNX file of others: the sum of its inputs."""
    values = [helper.make_tensor_value_info(f"in{index}", dtype, shape) for index, shape in enumerate(shapes)]
    result = helper.make_tensor_value_info('say "hi"\\', dtype, shapes[0])
    node = helper.make_node("Sum", [value.name for value in values], [result.name])
    graph = helper.make_graph([node], "g", values, [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path

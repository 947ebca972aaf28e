"""What an exported file multiplies and stores: MACs, weights, and how many of these are zero."""

from __future__ import annotations

import os

import numpy as np

from rkd_deploy.backends.files import model_path
from rkd_deploy.bench.graph_cost import graph_cost
from rkd_deploy.card import GraphFacts
from rkd_deploy.errors import UsageError, require


def graph_facts(path: str | os.PathLike[str]) -> GraphFacts | None:
    """Count what one image costs in an exported file, zeros included.

    Layers of S and A that lie side by side are one layer whose weights between the two are zeros: it multiplies and
    stores more than was trained.

    Args:
        path: Bundle folder or ONNX file with one input and images of a fixed size.

    Returns:
        The counts; None where the graph has an operator whose MACs cannot be told, or its shapes cannot.

    Raises:
        MissingDependencyError: onnx is not installed.
        ModelFileError: The file is no ONNX file.
    """
    onnx = require("onnx", "export")
    try:
        cost = graph_cost(path, batch=1)
    except UsageError:
        return None
    if cost.uncounted:
        return None
    graph = onnx.load(str(model_path(path))).graph
    constants = [*graph.initializer]
    constants += [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    weights = zeros = 0
    for constant in constants:
        values = onnx.numpy_helper.to_array(constant)
        # Whole numbers of 64 bits are shapes, and one number alone is a scale or a setting.
        if values.dtype == np.int64 or values.size == 1:
            continue
        weights += values.size
        zeros += int((values.astype(np.float32) == 0).sum()) if values.dtype.kind == "V" else int((values == 0).sum())
    return GraphFacts(macs=cost.macs, weights=weights, zeros=zeros)

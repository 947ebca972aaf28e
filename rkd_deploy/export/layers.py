"""The layers of an exported graph, by the names that people know them by.

A layer is a convolution or a matrix product with weights; its name is that of its module in PyTorch, as its weight
carries it ("network.layer1.0.conv1.weight" -> "layer1.0.conv1"). Other nodes keep the exporter's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rkd_deploy.errors import UsageError, unknown_name

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def preprocessing(proto: Any) -> list[str]:
    """Names of the nodes before the first layer: cast, transpose and normalisation, which stay in float32."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    after: set[str] = set()
    names = []
    for node in proto.graph.node:  # ONNX orders nodes so that each comes after those it reads from
        if _is_layer(node, weights) or any(name in after for name in node.input):
            after.update(node.output)
        else:
            names.append(node.name)
    return names


def quantisable(proto: Any, kinds: Iterable[str]) -> dict[str, str]:
    """Nodes of these kinds behind the pre-processing: name for people to name of the node."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    before, kinds = set(preprocessing(proto)), set(kinds)
    found: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in kinds and node.name not in before:
            own = _module(node, weights)
            found[node.name if own in found or not own else own] = node.name
    return found


def chosen(nodes: dict[str, str], names: Iterable[str]) -> list[str]:
    """Node names of layers given by either name.

    Raises:
        UsageError: There is no such layer.
    """
    own = set(nodes.values())
    for name in names:
        if name not in nodes and name not in own:
            raise UsageError(unknown_name("layer in --keep", name, nodes))
    return [nodes.get(name, name) for name in names]


def _is_layer(node: Any, weights: set[str]) -> bool:
    return node.op_type in WEIGHTED and any(name in weights for name in node.input)


def _module(node: Any, weights: set[str]) -> str:
    if not _is_layer(node, weights):
        return ""
    weight = next(name for name in node.input if name in weights)
    return str(weight).removeprefix("network.").removesuffix(".weight")

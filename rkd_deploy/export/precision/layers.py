"""Names the layers of an exported graph as people know them.

A layer is a convolution or a matrix product with weights; its name is that of its module in PyTorch, as its weight
carries it ("network.layer1.0.conv1.weight" -> "layer1.0.conv1"). Other nodes keep the exporter's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    layers: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in kinds and node.name not in before:
            module = _module(node, weights)
            # A layer that is called twice is two nodes of one module: the second keeps the name of its node.
            layers[node.name if module in layers or not module else module] = node.name
    return layers


def branch_layers(nodes: dict[str, str], number: int) -> dict[str, str]:
    """Rename the layers of one of several graphs whose logits add up (`early_exit.py`) as the fused graph has them.

    Args:
        nodes: As `quantisable` gives them of the graph of branch b = `number`, which is its only branch.
        number: 0 (S), 1, ..
    """
    if number == 0:
        return nodes
    return {_in_branch(name, name == node, number): node for name, node in nodes.items()}


def _in_branch(name: str, is_anonymous: bool, number: int) -> str:
    if is_anonymous:  # the exporter numbers such nodes in each graph anew
        return f"assistant_{number}.{name}"
    return name.replace("backbones.0.", f"backbones.{number}.")


def resolve_layers(nodes: Sequence[dict[str, str]], names: Iterable[str]) -> list[list[str]]:
    """Resolve names of layers to node names, for each graph; the first graph's node names are taken as well.

    Raises:
        UsageError: There is no such layer in any graph.
    """
    first = {node: node for node in nodes[0].values()} | nodes[0]
    tables, names = [first, *nodes[1:]], list(names)
    for name in names:
        if not any(name in table for table in tables):
            raise UsageError(unknown_name("layer in --keep", name, {key for named in nodes for key in named}))
    return [[table[name] for name in names if name in table] for table in tables]


def _is_layer(node: Any, weights: set[str]) -> bool:
    return node.op_type in WEIGHTED and any(name in weights for name in node.input)


def _module(node: Any, weights: set[str]) -> str:
    if not _is_layer(node, weights):
        return ""
    weight = next(name for name in node.input if name in weights)
    return str(weight).removeprefix("network.").removesuffix(".weight")

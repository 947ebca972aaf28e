"""Shortcuts that one branch projects and another takes as they are: the latter get a projection that changes nothing.

A block adds its input x where that has as many channels as its output, and x * P where it has not. Which of the two
depends on the widths, so two branches of one family may differ there and nowhere else. With P = 1, a 1x1 convolution
whose weights are the identity matrix, x * P = x exactly, and the branches have one topology.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from rkd_deploy.export import operations


def align(branches: Sequence[fx.GraphModule], x_NCHW: Tensor) -> None:
    """Give each branch the projections that another has and it lacks, in place; leave other differences alone.

    Args:
        branches: Traced backbones.
        x_NCHW: Images that they take.
    """
    cursors = [next(iter(branch.graph.nodes)) for branch in branches]
    while all(node.op != "output" for node in cursors):
        kinds = [_kind(branch, node) for branch, node in zip(branches, cursors, strict=True)]
        if len(set(kinds)) == 1:
            cursors = [node.next for node in cursors]
            continue
        if "convolution" not in kinds:
            return
        projecting = branches[kinds.index("convolution")]
        chain = _projection(projecting, cursors[kinds.index("convolution")])
        others = [b for b, kind in enumerate(kinds) if kind != "convolution"]
        if not chain or chain[-1] not in chain[-1].next.args or any(kinds[b] != "join" for b in others):
            return
        slot = chain[-1].next.args.index(chain[-1])
        layers = [projecting.get_submodule(str(link.target)) for link in chain]
        for b in others:
            cursors[b] = _insert(branches[b], cursors[b], slot, layers, x_NCHW)


def _kind(branch: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return operations.kind_of_module(branch.get_submodule(str(node.target)))
    return operations.kind_of_function(node.target) if node.op in ("call_function", "call_method") else node.op


def _projection(branch: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """A 1x1 convolution of stride 1, and the batch norm after it."""
    module = branch.get_submodule(str(node.target))
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or module.stride != (1, 1):
        return []
    return [node, node.next] if _kind(branch, node.next) == "norm" else [node]


def _insert(branch: fx.GraphModule, join: fx.Node, slot: int, layers: Sequence[nn.Module], x_NCHW: Tensor) -> fx.Node:
    """Put identities of the kind of `layers` before one operand of a join; the first of them is returned."""
    operand = join.args[slot]
    assert isinstance(operand, fx.Node)
    ShapeProp(branch).propagate(x_NCHW)
    channels = operand.meta["tensor_meta"].shape[1]
    made: list[fx.Node] = []
    for layer in layers:
        name = f"identity_{len(list(branch.children()))}"
        branch.add_module(name, _identity(layer, channels, x_NCHW.dtype))
        with branch.graph.inserting_before(join):
            made.append(branch.graph.call_module(name, (made[-1] if made else operand,)))
    join.update_arg(slot, made[-1])
    branch.recompile()
    return made[0]


def _identity(like: nn.Module, channels: int, dtype: torch.dtype) -> nn.Module:
    if not isinstance(like, nn.Conv2d):
        return nn.BatchNorm2d(channels, eps=0.0, affine=False, dtype=dtype).eval()
    conv = nn.Conv2d(channels, channels, 1, bias=False, dtype=dtype)
    conv.weight = nn.Parameter(torch.eye(channels, dtype=dtype)[:, :, None, None])
    return conv

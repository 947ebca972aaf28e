"""Sorts the operations of a traced network by how they can be merged (`wide.py`).

    convolution, norm     merged by their weights
    channelwise           on each channel alone, of no weights: activations, pooling
    join                  two maps element by element
    move                  channels change their order or number, no value changes
    identity              nothing, in eval mode
    other                 anything else: it cannot be merged

Only operations that were thought about are listed: one that mixes channels must not pass for one that does not.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_MOVE = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
_RANDOM = ("DropPath", "StochasticDepth", "DropBlock2d")
"""Names of layers that do nothing in eval mode: timm, torchvision and users each have their own class."""

_FUNCTIONAL = (
    "relu relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus "
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate"
)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "channelwise": (
        *(getattr(functional, name) for name in _FUNCTIONAL.split()),
        torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.max_pool2d, torch.mean, torch.square,
        torch.neg, operator.neg,
    ),
    "join": (
        operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, operator.sub, operator.isub,
        torch.sub, operator.truediv, torch.div, torch.maximum, torch.minimum,
    ),
    "move": (
        torch.cat, torch.concat, torch.chunk, torch.split, torch.reshape, torch.flatten, torch.unflatten,
        torch.transpose, torch.permute, torch.swapaxes, torch.unbind, torch.stack, torch.narrow, torch.squeeze,
        torch.unsqueeze, functional.channel_shuffle, operator.getitem, getattr,
    ),
    "functional norm": (functional.batch_norm,),
}  # fmt: skip
_METHODS = {
    "channelwise": "relu relu_ sigmoid sigmoid_ tanh clamp clamp_ mean neg square",
    "join": "add add_ mul mul_ sub sub_ div div_",
    "move": "view reshape flatten unflatten transpose permute contiguous chunk split unbind narrow size dim squeeze "
    "unsqueeze swapaxes",
}
_KINDS = {
    **{function: kind for kind, functions in _FUNCTIONS.items() for function in functions},
    **{name: kind for kind, names in _METHODS.items() for name in names.split()},
}
_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


class Tracer(fx.Tracer):
    """Looks into every module but PyTorch's own and those that do nothing in eval mode."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one operation."""
        return super().is_leaf_module(m, module_qualified_name) or type(m).__name__ in _RANDOM


def kind_of_module(module: nn.Module) -> str:
    """Kind of a layer, as listed at the top of this file; a subclass may do anything, so only exact types count."""
    if type(module) is nn.Conv2d:
        return "convolution"
    if type(module) is nn.BatchNorm2d:
        return "norm" if module.running_mean is not None else "other"
    if type(module) in _CHANNELWISE:
        return "channelwise"
    if type(module) in _IDENTITY or type(module).__name__ in _RANDOM:
        return "identity"
    return "move" if type(module) in _MOVE else "other"


def kind_of_function(target: Any) -> str:
    """Kind of a function, or of a tensor's method by its name, as listed at the top of this file."""
    if getattr(target, "__name__", "") == "stochastic_depth":
        return "identity"
    if target in (functional.dropout, functional.dropout2d):
        return "identity"
    return _KINDS.get(target, "other")


def settings(module: nn.Module) -> Any:
    """What two modules must have in common to be merged."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
    return type(module) if type(module) in (nn.BatchNorm2d, *_MOVE) else str(module)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> nn.BatchNorm2d | None:
    """The module of a functional batch norm (timm's BatchNormAct2d calls one); None in training mode."""
    if training or running_mean is None or running_var is None:
        return None
    norm = nn.BatchNorm2d(x.shape[1], eps=eps, affine=False)
    norm.running_mean, norm.running_var = running_mean, running_var
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            norm.register_parameter(name, nn.Parameter(value))
    return norm.eval()


def reads_alone(node: fx.Node) -> bool:
    """Whether no other operation reads the values of what this one reads; its shape may be read."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return all(user is node or user.target in (getattr, "size", "dim") for user in source.users)


def in_place(node: fx.Node, owner: nn.Module) -> bool:
    """Whether an operation writes over its first argument."""
    if node.op == "call_module":
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in _IN_PLACE or node.target is torch.relu_ or bool(node.kwargs.get("inplace", False))


def out_of_place(target: Any) -> Any:
    """The function or method that gives the same and leaves its argument as it is."""
    if isinstance(target, str):
        return target.removesuffix("_")
    return torch.relu if target is torch.relu_ else _IN_PLACE.get(target, target)


def align(branches: Sequence[fx.GraphModule], x_NCHW: Tensor) -> None:
    """Give each branch the projections that another has and it lacks, in place; leave other differences alone.

    Args:
        branches: Traced backbones.
        x_NCHW: Images that they take.
    """
    # A residual block has a projection only where its width or its stride changes. Narrowed by other amounts, S may
    # have one where A has none, and their topologies differ. A 1x1 convolution by the identity matrix is exact, so A
    # gets one.
    cursors = [next(iter(branch.graph.nodes)) for branch in branches]
    while all(node.op != "output" for node in cursors):
        kinds = [_kind(branch, node) for branch, node in zip(branches, cursors, strict=True)]
        if len(set(kinds)) == 1:
            cursors = [node.next for node in cursors]
            continue
        # Any other difference is left: the merger meets it, and says what it is.
        if "convolution" not in kinds:
            return
        projecting = branches[kinds.index("convolution")]
        chain = _projection(projecting, cursors[kinds.index("convolution")])
        others = [b for b, kind in enumerate(kinds) if kind != "convolution"]
        # What the others do here must be the addition that the projection leads to; then its operand on the same side
        # is what they project by the identity.
        if not chain or chain[-1] not in chain[-1].next.args or any(kinds[b] != "join" for b in others):
            return
        slot = chain[-1].next.args.index(chain[-1])
        layers = [projecting.get_submodule(str(link.target)) for link in chain]
        for b in others:
            cursors[b] = _insert(branches[b], cursors[b], slot, layers, x_NCHW)


def _kind(branch: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return kind_of_module(branch.get_submodule(str(node.target)))
    return kind_of_function(node.target) if node.op in ("call_function", "call_method") else node.op


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
    identities: list[fx.Node] = []
    for layer in layers:
        name = f"identity_{len(list(branch.children()))}"
        branch.add_module(name, _identity(layer, channels, x_NCHW.dtype))
        with branch.graph.inserting_before(join):
            identities.append(branch.graph.call_module(name, (identities[-1] if identities else operand,)))
    join.update_arg(slot, identities[-1])
    branch.recompile()
    return identities[0]


def _identity(like: nn.Module, channels: int, dtype: torch.dtype) -> nn.Module:
    if not isinstance(like, nn.Conv2d):
        return nn.BatchNorm2d(channels, eps=0.0, affine=False, dtype=dtype).eval()
    conv = nn.Conv2d(channels, channels, 1, bias=False, dtype=dtype)
    conv.weight = nn.Parameter(torch.eye(channels, dtype=dtype)[:, :, None, None])
    return conv

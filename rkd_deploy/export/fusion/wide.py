"""Merges backbones of one topology: each pair of layers side by side in one layer.

This is fusion level `wide`.

Letters: branch b = S, A_1, .. A_k has the map x_b [N, C_b, H, W]. The merged map X [N, C, H, W] holds the channels of
all branches; channel i of branch b is at position p_b(i):

    X[:, p_b(i)] = x_b[:, i]

At the image all branches have the same p: it is there once. By this every operation of the branches has its merged one:

    element by element, and pooling: r(X)[:, p_b(i)] = r(x_b)[:, i]: the same operation, the same positions.
    addition, product:  X + Y, where both have one p. Where they differ, Y is put in X's order first: for nothing in the
                        rows of the convolution that Y comes from, else by a Gather.
    convolution:        y_b = W_b * x_b + c_b becomes Y = W * X + c with
                            W[q_b(o), p_b(i)] = W_b[o, i], zero elsewhere,  c[q_b(o)] = c_b[o]
                        Of one input shared by all branches W is their weights one below the other, without a zero.
                        Else it is block-diagonal, up to the order of the channels. `layers.py` says when a grouped
                        convolution, which has no zeros, takes its place.
    batch norm:         into the convolution before it; where there is none (after an addition, in a Wide ResNet)
                        per channel, all branches in one.
    moving channels:    concatenation, splitting, shuffling: nothing is done, p changes. What comes of it is made only
                        where an operation needs it in one piece: one Concat, one Slice or one Gather, or nothing, where
                        all channels are there in some order. A convolution takes any order.

The branches are traced (torch.fx) and walked side by side, node by node. What moving does to p is not worked out from
each operation's rules: the operation is run on addresses, whole numbers that name a channel and a place in it. If
after it an address does not stand at its own place, data moved within a map, and that cannot be merged.

Zeros are exact, so values agree up to the order of summation, as long as the other branch's are finite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import operations
from rkd_deploy.export.fusion.channel_maps import MergedMaps, NotOnePiece, Stored, numbers_of
from rkd_deploy.export.fusion.layers import MergedConv, can_group, fold_norm, merge_convs, merge_norms
from rkd_deploy.export.fusion.operations import align

_SIZE = (64, 96)
"""Height and width of the image on which the branches are walked. Any would do that they can take: maps that are halved
and doubled again want multiples of 32, and a square would hide a transposed map."""


@dataclass(frozen=True)
class Merged:
    """Several backbones as one.

    Attributes:
        backbone: Images to the merged map.
        p: For each branch, the positions of its channels.
        channels: Number of channels of the merged map.
        can_group: Whether any layer is dense here and would be grouped with `grouped`.
    """

    backbone: nn.Module
    p: list[Tensor]
    channels: int
    can_group: bool


def merge(backbones: Sequence[nn.Module], *, grouped: bool = False, channels: int = 3) -> Merged:
    """Merge backbones of one topology; their widths may differ.

    Args:
        backbones: Images [N, 3, H, W] to maps [N, C_b, H', W'], in eval mode. Left as they are.
        grouped: Whether layers of equal widths become grouped convolutions instead of dense ones with zero blocks.
        channels: Channels of their common input: 3 for images, those of the trunk's map behind a trunk.

    Raises:
        UsageError: They have no common topology, or something in them cannot be merged; the message names it.
    """
    traced = [_traced(backbone) for backbone in backbones]
    parameter = next(backbones[0].parameters())
    with torch.no_grad():
        # Two images: with one, an operation that moves data from image to image would look like one that does not.
        align(traced, torch.zeros(2, channels, *_SIZE, dtype=parameter.dtype))
        return _Merger(traced, grouped, channels).run()


class _Merger:
    """Walks the branches side by side. Values are lists, with one entry for each branch."""

    def __init__(self, traced: Sequence[fx.GraphModule], grouped: bool, channels: int) -> None:
        self.branches, self.channels = traced, channels
        self.grouped, self.can_group = grouped, False
        self.maps = MergedMaps()
        self.env: list[dict[fx.Node, Any]] = [{} for _ in traced]
        self.nodes: tuple[fx.Node, ...] = ()

    def run(self) -> Merged:
        rows = [list(branch.graph.nodes) for branch in self.branches]
        # Graphs of unequal length differ in kind where the shorter ends: its output stands beside something else.
        for self.nodes in zip(*rows, strict=False):
            kinds = {(node.op, *self._kind(b, node)) for b, node in enumerate(self.nodes)}
            if len(kinds) > 1:
                operations = " and ".join(_described(node) for node in self.nodes)
                self._refuse(
                    f"their topologies differ: where one has {operations.replace(' and ', ', another has ', 1)}"
                )
            if self.nodes[0].op == "output":
                return self._finished()
            results = self._step(next(iter(kinds))[1])
            for env, node, result in zip(self.env, self.nodes, results, strict=True):
                env[node] = result
        raise AssertionError("a graph ends in its output")

    def _finished(self) -> Merged:
        stored, p = self.maps.piece([self._arguments(b)[0][0] for b in range(len(self.branches))])
        self.maps.graph.output(stored.node)
        self.maps.graph.lint()
        return Merged(fx.GraphModule(self.maps.root, self.maps.graph).eval(), p, len(stored.numbers), self.can_group)

    def _kind(self, b: int, node: fx.Node) -> tuple[str, Any]:
        """What the operation is to merging, and what must be alike in all branches."""
        if node.op == "call_module":
            module = self.branches[b].get_submodule(str(node.target))
            return operations.kind_of_module(module), operations.settings(module)
        if node.op in ("call_function", "call_method"):
            return operations.kind_of_function(node.target), node.target
        return node.op, None

    def _step(self, kind: str) -> list[Any]:
        if kind == "placeholder":
            count = len(self.branches)
            image = self.maps.graph.placeholder("x_NCHW")
            return self.maps.add(image, [torch.arange(self.channels)] * count, [(2, self.channels, *_SIZE)] * count)
        if kind == "get_attr":
            return [
                _attribute(branch, str(node.target)) for branch, node in zip(self.branches, self.nodes, strict=True)
            ]
        arguments = [self._arguments(b) for b in range(len(self.branches))]
        map_counts = [len(_maps_of(*branch_arguments)) for branch_arguments in arguments]
        if kind == "identity":
            return [args[0] for args, _ in arguments]
        if max(map_counts) == 0 or kind == "move":
            return [self._call(b, *arguments[b]) for b in range(len(self.branches))]
        steps: dict[str, Callable[[list[Any]], list[Tensor]]] = {
            "convolution": self._convolution,
            "norm": self._norm,
            "functional norm": self._functional_norm,
            "channelwise": self._channelwise,
            "join": self._join if min(map_counts) > 1 else self._channelwise,
        }
        if kind not in steps:
            self._refuse(f"{_described(self.nodes[0])} is no operation that it knows how to merge")
        try:
            results = steps[kind](arguments)
        except NotOnePiece as found:
            self._refuse(f"{_described(self.nodes[0])} reads {found}")
        if operations.in_place(self.nodes[0], self.branches[0]):
            for b, node in enumerate(self.nodes):  # who reads the argument later reads the result
                self.env[b][cast(fx.Node, node.args[0])] = results[b]
        return results

    def _convolution(self, arguments: list[Any]) -> list[Tensor]:
        convs = [cast(nn.Conv2d, self._module(b)) for b in range(len(self.branches))]
        maps = [args[0] for args, _ in arguments]
        numbers = numbers_of(maps)

        def merged_on(stored: Stored) -> MergedConv:
            p = [stored.positions(channels) for channels in numbers]
            self.can_group |= can_group(convs, p) and not self.grouped
            return merge_convs(convs, p, len(stored.numbers), grouped=self.grouped)

        # A grouped convolution wants its input channels set by set. A tensor that has them so costs nothing; only where
        # none has, one is gathered.
        for stored in self.maps.pieces(numbers):
            merged = merged_on(stored)
            if merged.order is None:
                break
        else:
            stored = self.maps.reordered(stored, cast(Tensor, merged.order))
            merged = merged_on(stored)
        node = self.maps.call_module(merged.conv, stored.node)
        return self.maps.add(node, merged.q, list(map(_shape_after, convs, maps)))

    def _norm(self, arguments: list[Any]) -> list[Tensor]:
        norms = [cast(nn.BatchNorm2d, self._module(b)) for b in range(len(self.branches))]
        return self._normalised([args[0] for args, _ in arguments], norms)

    def _functional_norm(self, arguments: list[Any]) -> list[Tensor]:
        norms = [operations.batch_norm(*args, **kwargs) for args, kwargs in arguments]
        if any(norm is None for norm in norms):
            self._refuse(f"{_described(self.nodes[0])} normalises by the statistics of the batch")
        return self._normalised([args[0] for args, _ in arguments], cast("list[nn.BatchNorm2d]", norms))

    def _normalised(self, maps: list[Tensor], norms: list[nn.BatchNorm2d]) -> list[Tensor]:
        stored, p = self.maps.piece(maps)
        norm = merge_norms(norms, p, len(stored.numbers))
        # Folding changes what the convolution gives, so nobody else may read that: not in the merged graph, and not in
        # any branch further down, which has not been walked yet.
        conv = self.maps.changeable_conv(stored)
        if conv is not None and all(operations.reads_alone(node) for node in self.nodes):
            fold_norm(conv, norm)
            return maps
        return self.maps.add(self.maps.call_module(norm, stored.node), p, [map_.shape for map_ in maps])

    def _channelwise(self, arguments: list[Any]) -> list[Tensor]:
        maps = [_maps_of(*branch_arguments) for branch_arguments in arguments]
        settings = [_without_maps(*branch_arguments) for branch_arguments in arguments]
        if any(other != settings[0] for other in settings):
            self._refuse(f"{_described(self.nodes[0])} has other settings in one branch than in another")
        # A second tensor (a size, a slope per channel) would have to be merged by a rule of its own, and there is none.
        if any(len(node.all_input_nodes) > 1 for node in self.nodes):
            self._refuse(f"{_described(self.nodes[0])} depends on a tensor or on the size of a map")
        stored, p = self.maps.piece([map_ for (map_,) in maps])
        shapes = [self._shape(b, map_) for b, (map_,) in enumerate(maps)]
        if any(len(shape) != 4 or shape[:2] != (2, len(p_b)) for shape, p_b in zip(shapes, p, strict=True)):
            self._refuse(f"{_described(self.nodes[0])} gives no map of the same channels")
        return self.maps.add(self._emitted(stored.node), p, shapes)

    def _join(self, arguments: list[Any]) -> list[Tensor]:
        left, right = zip(*(_maps_of(*channels) for channels in arguments), strict=True)
        if any(a.shape[:2] != b.shape[:2] for a, b in zip(left, right, strict=True)):
            self._refuse(f"{_described(self.nodes[0])} joins maps of unequal numbers of channels")
        pairs = list(zip(left, right, strict=True))
        X, Y = self.maps.aligned(numbers_of(left), numbers_of(right))
        p = [X.positions(channels) for channels in numbers_of(left)]
        node = self.maps.graph.call_function(operations.out_of_place(self.nodes[0].target), (X.node, Y.node))
        return self.maps.add(node, p, [(a[:1, :1] + b[:1, :1]).expand(*a.shape[:2], -1, -1).shape for a, b in pairs])

    def _emitted(self, map_: fx.Node) -> fx.Node:
        """The operation of the first branch, on the merged map."""
        node = self.nodes[0]
        if node.op == "call_module":
            module = copy.deepcopy(self._module(0))
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010  (mypy knows modules' attributes as tensors only)
            return self.maps.call_module(module, map_)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: map_)
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        return self.maps.graph.create_node(node.op, operations.out_of_place(node.target), args, kwargs)

    def _arguments(self, b: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        env = self.env[b].__getitem__
        args, kwargs = fx.map_arg((self.nodes[b].args, self.nodes[b].kwargs), env)
        return args, kwargs

    def _call(self, b: int, args: Any, kwargs: Any) -> Any:
        node = self.nodes[b]
        try:
            if node.op == "call_module":
                return self._module(b)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return cast("Callable[..., Any]", node.target)(*args, **kwargs)
        except Exception as error:  # whatever the network's own code raises on maps of this size
            self._refuse(f"{_described(node)} fails on an image of {_SIZE[0]} x {_SIZE[1]} pixels ({error})")

    def _shape(self, b: int, addresses: Tensor) -> tuple[int, ...]:
        """Shape of what an operation that reads one map gives, found on a tensor without data."""
        x = torch.empty(addresses.shape, device="meta")
        args, kwargs = fx.map_arg((self.nodes[b].args, self.nodes[b].kwargs), lambda _: x)
        return tuple(self._call(b, args, kwargs).shape)

    def _module(self, b: int) -> nn.Module:
        return self.branches[b].get_submodule(str(self.nodes[b].target))

    def _refuse(self, reason: str) -> NoReturn:
        raise UsageError(
            f"Level wide cannot merge the branches: {reason}. "
            "Use --fuse tail, which needs no common topology and is equal in value."
        )


def _traced(backbone: nn.Module) -> fx.GraphModule:
    tracer = operations.Tracer()
    try:
        graph = tracer.trace(backbone)
    except Exception as error:  # symbols break a forward that looks at values in any way that Python code can break
        raise UsageError(
            f"Level wide cannot merge the branches: {type(backbone).__name__} cannot be traced ({error}). "
            "Use --fuse tail, which needs no trace and is equal in value."
        ) from error
    return fx.GraphModule(tracer.root, graph)


def _shape_after(conv: nn.Conv2d, addresses: Tensor) -> tuple[int, ...]:
    x, weight = (torch.empty(like.shape, device="meta") for like in (addresses, conv.weight))
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    return tuple(nn.functional.conv2d(x, weight, None, stride, padding, dilation, conv.groups).shape)


def _maps_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The addresses among the arguments; parameters of the network are no whole numbers."""
    maps: list[Tensor] = []

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_floating_point():
            maps.append(value)

    fx.node.map_aggregate((args, kwargs), look)
    return maps


def _without_maps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The other arguments, to be compared."""
    return str(fx.node.map_aggregate((args, kwargs), lambda value: "map" if isinstance(value, Tensor) else value))


def _attribute(owner: nn.Module, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _described(node: fx.Node) -> str:
    """The operation and the module path at which it stands."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        return f"the layer {what}"
    return f"{what}() in {path or 'the network itself'}"

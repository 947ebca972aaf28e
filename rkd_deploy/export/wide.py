"""Level `wide`: several backbones of one topology as one, each pair of layers side by side in one layer.

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
                        Else it is block-diagonal, up to the order of the channels. `wide_layers.py` says when a grouped
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
from rkd_deploy.export import operations
from rkd_deploy.export.alignment import align
from rkd_deploy.export.wide_layers import fold_norm, merge_convs, merge_norms

_SIZE = (64, 48)
"""Height and width of the image on which the branches are walked; any would do that they can take, if not square."""
_PLACES = 1 << 32
"""Addresses of one channel: more than it has places."""


@dataclass(frozen=True)
class Merged:
    """Several backbones as one.

    Attributes:
        backbone: Images to the merged map.
        p: For each branch, the positions of its channels.
        channels: Of the merged map.
        grouped: Whether any layer could be merged as a grouped convolution that `grouped` = False makes dense.
    """

    backbone: nn.Module
    p: list[Tensor]
    channels: int
    grouped: bool


def merge(backbones: Sequence[nn.Module], *, grouped: bool = False) -> Merged:
    """Merge backbones of one topology; their widths may differ.

    Args:
        backbones: Images [N, 3, H, W] to maps [N, C_b, H', W'], in eval mode. Left as they are.
        grouped: Whether layers of equal widths become grouped convolutions instead of dense ones with zero blocks.

    Raises:
        UsageError: They have no common topology, or something in them cannot be merged; the message names it.
    """
    traced = [_traced(backbone) for backbone in backbones]
    parameter = next(backbones[0].parameters())
    with torch.no_grad():
        align(traced, torch.zeros(2, 3, *_SIZE, dtype=parameter.dtype))
        return _Merger(traced, grouped).run()


@dataclass(frozen=True)
class _Stored:
    """A tensor of the merged graph.

    Attributes:
        node: That makes it.
        numbers: Of its channels. Every channel has its own from the operation that computed it, wherever it is moved.
    """

    node: fx.Node
    numbers: Tensor

    def positions(self, numbers: Tensor) -> Tensor:
        """Where channels of these numbers are."""
        sorted_numbers, places = self.numbers.sort()
        return places[torch.searchsorted(sorted_numbers, numbers)]


class _Merger:
    """Walks the branches side by side. Values are lists, with one entry for each branch."""

    def __init__(self, traced: Sequence[fx.GraphModule], grouped: bool) -> None:
        self.branches = traced
        self.grouped, self.could_group = grouped, False
        self.root, self.graph = nn.Module(), fx.Graph()
        self.env: list[dict[fx.Node, Any]] = [{} for _ in traced]
        self.stored: dict[tuple[int, ...], list[_Stored]] = {}
        """By the sorted numbers of its channels: the same channels can be there in several orders."""
        self.count = 0
        self.nodes: tuple[fx.Node, ...] = ()

    def run(self) -> Merged:
        rows = [list(branch.graph.nodes) for branch in self.branches]
        for self.nodes in zip(*rows, strict=False):
            kinds = {(node.op, *self._kind(b, node)) for b, node in enumerate(self.nodes)}
            if len(kinds) > 1:
                found = " and ".join(_described(node) for node in self.nodes)
                self._refuse(f"their topologies differ: where one has {found.replace(' and ', ', another has ', 1)}")
            if self.nodes[0].op == "output":
                return self._finished()
            results = self._step(next(iter(kinds))[1])
            for env, node, result in zip(self.env, self.nodes, results, strict=True):
                env[node] = result
        raise AssertionError("a graph ends in its output")

    def _finished(self) -> Merged:
        stored, p = self._piece([self._arguments(b)[0][0] for b in range(len(self.branches))])
        self.graph.output(stored.node)
        self.graph.lint()
        return Merged(fx.GraphModule(self.root, self.graph).eval(), p, len(stored.numbers), self.could_group)

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
            start = self._new(self.graph.placeholder("x_NCHW"), 3)
            return [_addresses(start + torch.arange(3), (2, 3, *_SIZE))] * len(self.branches)
        if kind == "get_attr":
            return [_attribute(branch, str(node.target)) for branch, node in zip(self.branches, self.nodes, strict=True)]
        arguments = [self._arguments(b) for b in range(len(self.branches))]
        maps = _count_maps(arguments[0])
        if kind == "identity":
            return [args[0] for args, _ in arguments]
        if maps == 0 or kind == "move":
            return [self._call(b, *arguments[b]) for b in range(len(self.branches))]
        steps: dict[str, Callable[[list[Any]], list[Tensor]]] = {
            "convolution": self._convolution,
            "norm": self._norm,
            "functional norm": self._functional_norm,
            "channelwise": self._channelwise,
            "join": self._join if maps > 1 else self._channelwise,
        }
        if kind not in steps:
            self._refuse(f"{_described(self.nodes[0])} is no operation that it knows how to merge")
        results = steps[kind](arguments)
        if operations.in_place(self.nodes[0], self.branches[0]):
            for b, node in enumerate(self.nodes):  # who reads the argument later reads the result
                self.env[b][cast(fx.Node, node.args[0])] = results[b]
        return results

    def _convolution(self, arguments: list[Any]) -> list[Tensor]:
        convs = [cast(nn.Conv2d, self._module(b)) for b in range(len(self.branches))]
        maps = [args[0] for args, _ in arguments]
        numbers = self._numbers(maps)
        found = self._pieces(numbers)
        for stored in found:
            p = [stored.positions(one) for one in numbers]
            merged = merge_convs(convs, p, len(stored.numbers), grouped=self.grouped)
            if merged.order is None:
                break
        else:
            stored = self._reordered(found[0], merged.order)
            p = [stored.positions(one) for one in numbers]
            merged = merge_convs(convs, p, len(stored.numbers), grouped=self.grouped)
        if not self.grouped:
            grouped = merge_convs(convs, p, len(stored.numbers), grouped=True)
            self.could_group |= grouped.conv.groups != merged.conv.groups
        node = self._call_module(merged.conv, stored.node)
        return self._results(node, merged.q, list(map(_shape_after, convs, maps)))

    def _norm(self, arguments: list[Any]) -> list[Tensor]:
        norms = [cast(nn.BatchNorm2d, self._module(b)) for b in range(len(self.branches))]
        return self._normalised([args[0] for args, _ in arguments], norms)

    def _functional_norm(self, arguments: list[Any]) -> list[Tensor]:
        norms = [operations.batch_norm(*args, **kwargs) for args, kwargs in arguments]
        if any(norm is None for norm in norms):
            self._refuse(f"{_described(self.nodes[0])} normalises by the statistics of the batch")
        return self._normalised([args[0] for args, _ in arguments], cast("list[nn.BatchNorm2d]", norms))

    def _normalised(self, maps: list[Tensor], norms: list[nn.BatchNorm2d]) -> list[Tensor]:
        stored, p = self._piece(maps)
        norm = merge_norms(norms, p, len(stored.numbers))
        conv = self._own_conv(stored)
        alone = all(len(cast(fx.Node, node.args[0]).users) == 1 for node in self.nodes)
        if conv is not None and alone:
            fold_norm(conv, norm)
            return maps
        return self._results(self._call_module(norm, stored.node), p, [one.shape for one in maps])

    def _channelwise(self, arguments: list[Any]) -> list[Tensor]:
        maps, rest = zip(*(_split(args, kwargs) for args, kwargs in arguments), strict=True)
        if any(one != rest[0] for one in rest):
            self._refuse(f"{_described(self.nodes[0])} has other settings in one branch than in another")
        stored, p = self._piece([one[0] for one in maps])
        shapes = [self._shape(b, one[0]) for b, one in enumerate(maps)]
        if any(len(shape) != 4 or shape[1] != len(one) for shape, one in zip(shapes, p, strict=True)):
            self._refuse(f"{_described(self.nodes[0])} gives no map of the same channels")
        node = self._emitted({"map": stored.node})
        return self._results(node, p, shapes)

    def _join(self, arguments: list[Any]) -> list[Tensor]:
        left, right = ([_split(*one)[0][side] for one in arguments] for side in (0, 1))
        if any(a.shape[1] != b.shape[1] for a, b in zip(left, right, strict=True)):
            self._refuse(f"{_described(self.nodes[0])} joins maps of unequal numbers of channels")
        X, Y = self._aligned(self._numbers(left), self._numbers(right))
        p = [X.positions(one) for one in self._numbers(left)]
        node = self.graph.call_function(operations.out_of_place(self.nodes[0].target), (X.node, Y.node))
        shapes = [torch.broadcast_shapes(a.shape, b.shape) for a, b in zip(left, right, strict=True)]
        return self._results(node, p, shapes)

    def _aligned(self, left: list[Tensor], right: list[Tensor]) -> tuple[_Stored, _Stored]:
        """Tensors of both maps in which each channel has one position."""
        pairs = [(X, Y) for X in self._pieces(left) for Y in self._pieces(right)]

        def places(stored: _Stored, numbers: list[Tensor]) -> Tensor:
            return torch.cat([stored.positions(one) for one in numbers])

        for X, Y in pairs:
            if torch.equal(places(X, left), places(Y, right)):
                return X, Y
        for X, Y in pairs:
            if (conv := self._own_conv(Y)) is not None and conv.groups == 1:
                return X, self._relaid(Y, conv, places(X, left), places(Y, right))
            if (conv := self._own_conv(X)) is not None and conv.groups == 1:
                return self._relaid(X, conv, places(Y, right), places(X, left)), Y
        X, Y = pairs[0]
        order = torch.empty(len(Y.numbers), dtype=torch.long)
        order[places(X, left)] = places(Y, right)
        return X, self._reordered(Y, order)

    def _own_conv(self, stored: _Stored) -> nn.Conv2d | None:
        """The convolution that a tensor comes from, where nobody has read that yet: it can still be changed."""
        if stored.node.op != "call_module" or stored.node.users:
            return None
        module = self.root.get_submodule(str(stored.node.target))
        return module if isinstance(module, nn.Conv2d) else None

    def _relaid(self, stored: _Stored, conv: nn.Conv2d, wanted: Tensor, places: Tensor) -> _Stored:
        """The rows of a convolution in another order."""
        order = torch.empty_like(places)
        order[wanted] = places
        conv.weight = nn.Parameter(conv.weight[order])
        conv.bias = None if conv.bias is None else nn.Parameter(conv.bias[order])
        relaid = _Stored(stored.node, stored.numbers[order])
        self.stored[_key(stored.numbers)] = [relaid]
        return relaid

    def _piece(self, maps: list[Tensor]) -> tuple[_Stored, list[Tensor]]:
        """One tensor that holds exactly the channels of these maps, and p."""
        numbers = self._numbers(maps)
        stored = self._pieces(numbers)[0]
        return stored, [stored.positions(one) for one in numbers]

    def _pieces(self, numbers: list[Tensor]) -> list[_Stored]:
        """All tensors that hold exactly these channels; one is made where there is none."""
        wanted = torch.cat(numbers).unique()
        if found := self.stored.get(_key(wanted)):
            return found
        parts, missing = [], wanted
        while len(missing):  # from the tensors that were computed, each channel from one
            source = next(one for (one, *_) in self.stored.values() if torch.isin(missing, one.numbers).any())
            parts.append(self._selected(source, torch.isin(source.numbers, missing)))
            missing = missing[~torch.isin(missing, source.numbers)]
        if len(parts) > 1:
            node = self.graph.call_function(torch.cat, ([part.node for part in parts], 1))
            parts = [_Stored(node, torch.cat([part.numbers for part in parts]))]
        self.stored[_key(wanted)] = parts
        return parts

    def _selected(self, source: _Stored, chosen: Tensor) -> _Stored:
        places = chosen.nonzero().flatten()
        if chosen.all():
            return source
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 == len(places):
            node = self.graph.call_function(torch.narrow, (source.node, 1, first, len(places)))
            return _Stored(node, source.numbers[places])
        return self._gathered(source, places)

    def _reordered(self, stored: _Stored, order: Tensor) -> _Stored:
        gathered = self._gathered(stored, order)
        self.stored[_key(stored.numbers)].append(gathered)
        return gathered

    def _gathered(self, source: _Stored, places: Tensor) -> _Stored:
        name = f"places_{len(list(self.root.buffers()))}"
        self.root.register_buffer(name, places)
        index = self.graph.get_attr(name)
        return _Stored(self.graph.call_function(torch.index_select, (source.node, 1, index)), source.numbers[places])

    def _numbers(self, maps: list[Tensor]) -> list[Tensor]:
        """The channels of maps [N, C, H, W] by their numbers."""
        found = []
        for addresses in maps:
            if not isinstance(addresses, Tensor) or addresses.ndim != 4:
                self._refuse(f"{_described(self.nodes[0])} reads something that is no map [N, C, H, W]")
            numbers = addresses[0, :, 0, 0] // _PLACES
            if not torch.equal(addresses, _addresses(numbers, addresses.shape)):
                self._refuse(f"{_described(self.nodes[0])} reads a map whose data was moved from place to place")
            found.append(numbers)
        return found

    def _results(self, node: fx.Node, q: list[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        start = self._new(node, int(torch.cat(q).max()) + 1)
        return [_addresses(start + one, shape) for one, shape in zip(q, shapes, strict=True)]

    def _new(self, node: fx.Node, channels: int) -> int:
        """Numbers for the channels of a tensor that was computed."""
        start, self.count = self.count, self.count + channels
        numbers = torch.arange(start, self.count)
        self.stored[_key(numbers)] = [_Stored(node, numbers)]
        return start

    def _call_module(self, module: nn.Module, x: fx.Node) -> fx.Node:
        name = f"{type(module).__name__.lower()}_{len(list(self.root.children()))}"
        self.root.add_module(name, module)
        return self.graph.call_module(name, (x,))

    def _emitted(self, places: dict[str, fx.Node]) -> fx.Node:
        """The operation of the first branch in the merged graph, on another map."""
        node = self.nodes[0]
        if node.op == "call_module":
            module = copy.deepcopy(self._module(0))
            if hasattr(module, "inplace"):
                module.inplace = False
            return self._call_module(module, places["map"])
        args, kwargs = self._arguments(0)

        def placed(value: Any) -> Any:
            return places["map"] if isinstance(value, Tensor) else value

        args, kwargs = tuple(map(placed, args)), {key: placed(value) for key, value in kwargs.items()}
        kwargs.pop("inplace", None)
        return self.graph.create_node(node.op, operations.out_of_place(node.target), args, kwargs)

    def _arguments(self, b: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        env = self.env[b].__getitem__
        args, kwargs = fx.map_arg((self.nodes[b].args, self.nodes[b].kwargs), env)
        return args, kwargs

    def _call(self, b: int, args: Any, kwargs: Any) -> Any:
        node = self.nodes[b]
        if node.op == "call_module":
            return self._module(b)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast("Callable[..., Any]", node.target)(*args, **kwargs)

    def _shape(self, b: int, addresses: Tensor) -> tuple[int, ...]:
        """Of what an operation with one map gives."""
        x = torch.empty(addresses.shape, device="meta")
        args, kwargs = fx.node.map_aggregate(self._arguments(b), lambda value: x if isinstance(value, Tensor) else value)  # type: ignore[misc, arg-type]
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


def _addresses(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C, H, W]: each channel's number, and each of its places."""
    N, _, H, W = shape
    return numbers[:, None, None] * _PLACES + torch.arange(N * H * W).view(N, 1, H, W)


def _shape_after(conv: nn.Conv2d, addresses: Tensor) -> tuple[int, ...]:
    x, weight = (torch.empty(like.shape, device="meta") for like in (addresses, conv.weight))
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    return tuple(nn.functional.conv2d(x, weight, None, stride, padding, dilation, conv.groups).shape)  # type: ignore[arg-type]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """The maps among the arguments, and the others."""
    values = [*args, *(value for key, value in sorted(kwargs.items()) if key != "inplace")]
    return [one for one in values if isinstance(one, Tensor)], [one for one in values if not isinstance(one, Tensor)]


def _count_maps(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    found: list[Tensor] = []
    fx.node.map_aggregate(arguments, lambda value: found.append(value) if isinstance(value, Tensor) else None)  # type: ignore[arg-type, func-returns-value]
    return sum(not one.is_floating_point() for one in found)


def _attribute(owner: nn.Module, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _key(numbers: Tensor) -> tuple[int, ...]:
    return tuple(numbers.sort().values.tolist())


def _described(node: fx.Node) -> str:
    """The operation and the module path at which it stands."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        return f"the layer {what}"
    return f"{what}() in {path or 'the network itself'}"

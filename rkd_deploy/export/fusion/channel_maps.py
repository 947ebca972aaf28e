"""Keeps account of which channel is where in a merged graph.

Letters and ideas are those of `wide.py`. Every channel has a number, from the operation that computed it, wherever it
is moved afterwards. What a branch's map holds is written as addresses [N, C, H, W]: number times `PLACES` plus place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, fx, nn

# Addresses are int64: 2^32 places leave room for 2^31 channels, and neither is ever reached.
PLACES = 1 << 32
"""Addresses of one channel: more than it has places."""


class NotOnePiece(Exception):
    """What is read is no map of whole channels."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the merged graph.

    Attributes:
        node: The operation that makes it.
        numbers: Number of each of its channels, given by the operation that computed it and kept wherever it is moved.
    """

    node: fx.Node
    numbers: Tensor

    def positions(self, numbers: Tensor) -> Tensor:
        """The places, in this tensor, of the channels with these numbers."""
        sorted_numbers, places = self.numbers.sort()
        return places[torch.searchsorted(sorted_numbers, numbers)]


class MergedMaps:
    """The merged graph as far as it is made, and where its channels are.

    Attributes:
        graph: The operations.
        root: The layers that they call.
    """

    def __init__(self) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self._stored: dict[tuple[int, ...], list[Stored]] = {}
        """Tensors by the sorted numbers of their channels, which can be there in several orders."""
        self._count = 0

    def add(self, node: fx.Node, q: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Take up a map that was computed.

        Args:
            node: The operation that computes it.
            q: For each branch, the places of its channels; equal ones for channels that branches share.
            shapes: For each branch, the shape of its own map.

        Returns:
            For each branch, the addresses of its own map.
        """
        start, self._count = self._count, self._count + int(torch.cat(list(q)).max()) + 1
        numbers = torch.arange(start, self._count)
        self._stored[_key(numbers)] = [Stored(node, numbers)]
        return [_addresses(start + places, shape) for places, shape in zip(q, shapes, strict=True)]

    def call_module(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """A layer in the graph."""
        name = f"{type(module).__name__.lower()}_{len(list(self.root.children()))}"
        self.root.add_module(name, module)
        return self.graph.call_module(name, (x,))

    def piece(self, maps: Sequence[Tensor]) -> tuple[Stored, list[Tensor]]:
        """One tensor that holds exactly the channels of these maps, and p."""
        numbers = numbers_of(maps)
        stored = self.pieces(numbers)[0]
        return stored, [stored.positions(channels) for channels in numbers]

    def pieces(self, numbers: Sequence[Tensor]) -> list[Stored]:
        """All tensors that hold exactly these channels; one is made where there is none."""
        wanted = torch.cat(list(numbers)).unique()  # type: ignore[no-untyped-call]
        if stored := self._stored.get(_key(wanted)):
            return stored
        parts, missing = [], wanted
        while len(missing):  # each channel from the first tensor that has it
            source = next(tensor for (tensor, *_) in self._stored.values() if torch.isin(missing, tensor.numbers).any())
            parts.append(self._selected(source, torch.isin(source.numbers, missing)))
            missing = missing[~torch.isin(missing, source.numbers)]
        if len(parts) > 1:
            node = self.graph.call_function(torch.cat, ([part.node for part in parts], 1))
            parts = [Stored(node, torch.cat([part.numbers for part in parts]))]
        self._stored[_key(wanted)] = parts
        return parts

    def aligned(self, left: list[Tensor], right: list[Tensor]) -> tuple[Stored, Stored]:
        """Tensors of both maps in which each channel has one position."""
        pairs = list(product(self.pieces(left), self.pieces(right)))

        def places(stored: Stored, numbers: list[Tensor]) -> Tensor:
            return torch.cat([stored.positions(channels) for channels in numbers])

        # From the cheapest on. Nothing to do: some tensor has the order already.
        for X, Y in pairs:
            if torch.equal(places(X, left), places(Y, right)):
                return X, Y
        # Nothing at run time: the rows of a convolution that nobody has read yet are put in order. Not those of a
        # grouped one, which are bound to their group.
        for X, Y in pairs:
            if (conv := self.changeable_conv(Y)) is not None and conv.groups == 1:
                return X, self._relaid(Y, conv, places(X, left), places(Y, right))
            if (conv := self.changeable_conv(X)) is not None and conv.groups == 1:
                return self._relaid(X, conv, places(Y, right), places(X, left)), Y
        # A Gather, which copies the map at every call.
        X, Y = pairs[0]
        order = torch.empty(len(Y.numbers), dtype=torch.long)
        order[places(X, left)] = places(Y, right)
        return X, self.reordered(Y, order)

    def changeable_conv(self, stored: Stored) -> nn.Conv2d | None:
        """The convolution that a tensor comes from, where nobody has read that yet: it can still be changed."""
        if stored.node.op != "call_module" or stored.node.users:
            return None
        module = self.root.get_submodule(str(stored.node.target))
        return module if isinstance(module, nn.Conv2d) else None

    def _relaid(self, stored: Stored, conv: nn.Conv2d, wanted: Tensor, places: Tensor) -> Stored:
        """The rows of a convolution in another order."""
        order = torch.empty_like(places)
        order[wanted] = places
        conv.weight = nn.Parameter(conv.weight[order])
        conv.bias = None if conv.bias is None else nn.Parameter(conv.bias[order])
        relaid = Stored(stored.node, stored.numbers[order])
        self._stored[_key(stored.numbers)] = [relaid]
        return relaid

    def _selected(self, source: Stored, chosen: Tensor) -> Stored:
        places = chosen.nonzero().flatten()
        if chosen.all():
            return source
        # Channels in one stretch are a Slice, which runtimes give as a view or fold away; a Gather always copies.
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 == len(places):
            node = self.graph.call_function(torch.narrow, (source.node, 1, first, len(places)))
            return Stored(node, source.numbers[places])
        return self._gathered(source, places)

    def reordered(self, stored: Stored, order: Tensor) -> Stored:
        """A tensor put into another order by a Gather, and remembered as another place of the same channels."""
        gathered = self._gathered(stored, order)
        self._stored[_key(stored.numbers)].append(gathered)
        return gathered

    def _gathered(self, source: Stored, places: Tensor) -> Stored:
        name = f"places_{len(list(self.root.buffers()))}"
        self.root.register_buffer(name, places)
        index = self.graph.get_attr(name)
        return Stored(self.graph.call_function(torch.index_select, (source.node, 1, index)), source.numbers[places])


def numbers_of(maps: Sequence[Tensor]) -> list[Tensor]:
    """The channels of maps [N, C, H, W] by their numbers.

    Raises:
        NotOnePiece: They are no such maps, or a channel's data is not where it was computed.
    """
    numbers_by_map = []
    for addresses in maps:
        if not isinstance(addresses, Tensor) or addresses.ndim != 4:
            raise NotOnePiece("something that is no map [N, C, H, W]")
        # The numbers are read at one place, and then every address is held against what they should be: an operation
        # that moved data within a map, or mixed the images of a batch, is found out whatever it was.
        numbers = addresses[0, :, 0, 0] // PLACES
        if not torch.equal(addresses, _addresses(numbers, addresses.shape)):
            raise NotOnePiece("a map whose data was moved from place to place")
        numbers_by_map.append(numbers)
    return numbers_by_map


def _addresses(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C, H, W]: each channel's number, and each of its places."""
    N, _, H, W = shape
    return numbers[:, None, None] * PLACES + torch.arange(N * H * W).view(N, 1, H, W)


def _key(numbers: Tensor) -> tuple[int, ...]:
    return tuple(numbers.sort().values.tolist())

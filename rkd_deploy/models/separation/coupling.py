"""Finds the channels of a network that can only be removed together.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) says which layers share their channels: through
additions, concatenations, depthwise convolutions, gates. From it follow the units, spaces and widths of `channels.py`.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError, require
from rkd_deploy.models.separation.channels import STAYS, Channels, Indices, Space
from rkd_deploy.models.separation.dependency_graph import ChannelGraph, cuts_channels

tp: Any = require("torch_pruning", "train")

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)


def trace_channels(
    network: nn.Module, input_size: tuple[int, int], output: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> Channels:
    """Find the channels of a network that can be removed, and which of them go together.

    Args:
        network: RGB images to the output that is used; layers that do not run are not narrowed. It is left as it is: a
            copy is run once, on the CPU. Its weights decide on the importances alone.
        input_size: Height and width in pixels.
        output: Gives the output that is used. Default: the network's own answer.

    Raises:
        UsageError: A layer's channels cannot be removed; the message names the layer.
    """
    # Torch-Pruning reads the graph of autograd, in which frozen weights have no node.
    network = copy.deepcopy(network).cpu().float().requires_grad_(True)
    with torch.enable_grad():
        graph = ChannelGraph().build_dependency(
            network,
            [torch.zeros(1, 3, *input_size)],  # a bare tensor would be unpacked, and lose its batch
            forward_fn=None if output is None else lambda model, inputs: output(model, *inputs),
            output_transform=lambda y: y * 1,  # else the last layer stands for the output
            verbose=False,
        )
    coupling = _Coupling(network, graph)
    importance = tp.importance.GroupMagnitudeImportance()
    groups = graph.get_all_groups()
    latest = "its input"
    try:
        for group in groups:
            latest = graph._module2name.get(group[0].dep.target.module, latest)
            coupling.add(group, _importance(group, importance))
    except UsageError:
        raise
    except (IndexError, ValueError, RuntimeError) as error:  # channels that Torch-Pruning loses track of
        reason = graph.regrouped or f"{type(error).__name__}: {error}"
        raise UsageError(
            f"S0 cannot be narrowed: the channels of module {latest} cannot be followed through the network "
            f"({reason}). Give another S0: a convolutional network. Any network can be the "
            "teacher."
        ) from error
    coupling.tie_grouped_convolutions()
    coupling.tie_splits()
    return coupling.numbered()


def _importance(group: Any, importance: Any) -> Tensor | None:
    """Importance of each channel of a group; None where a layer's shape is not known to Torch-Pruning: all alike then.

    It fails on a convolution of one group for each input that has several outputs. Importances decide which weights are
    inherited, and nothing else.
    """
    grouped = any(
        isinstance(layer := item.dep.target.module, nn.Conv2d)
        and layer.groups == layer.in_channels < layer.out_channels
        and layer.groups > 1
        for item in group
    )
    return None if grouped else importance(group)


def _norm_size(layer: Any) -> int:
    """Channels of a norm or a PReLU; a norm without weights and statistics has its settings alone."""
    if layer.weight is not None:
        return len(layer.weight)
    for name in ("num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.normalized_shape[-1])


class _Forest:
    """A union-find structure: numbers that were joined have the same root."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def __len__(self) -> int:
        return len(self._parent)

    def grow(self, count: int) -> None:
        self._parent += range(len(self), len(self) + count)

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]  # halves the path, so that long chains stay cheap
            item = self._parent[item]
        return item

    def join(self, items: Iterable[int]) -> None:
        roots = sorted({self.root(item) for item in items})
        for other in roots[1:]:
            self._parent[other] = roots[0]  # the smallest: roots stay in the order of the channels

    def roots(self) -> Indices:
        return np.array([self.root(item) for item in range(len(self))], dtype=np.int64)


class _Coupling:
    """Collects which channel each index of each axis is, and which channels go together.

    Torch-Pruning gives a group for each layer; channels that come up in several groups tie those together. So a channel
    begins as a unit and a space of its own, and both are joined as ties are found.
    """

    def __init__(self, network: nn.Module, graph: Any) -> None:
        self._graph = graph
        self._names: dict[Any, str] = {module: name for name, module in network.named_modules()}
        self._names |= {parameter: name for name, parameter in network.named_parameters()}
        self._places = {name: place for place, name in enumerate(self._names.values())}
        self._owner: dict[tuple[Any, str], Indices] = {}  # by (layer, side): the channel of each index, or STAYS
        self._units, self._spaces, self._widths = _Forest(), _Forest(), _Forest()
        self._home: list[int] = []  # of each channel, the number of its group of Torch-Pruning's
        self._score: list[float] = []
        self._fixed: dict[int, str] = {}  # groups of which nothing can be removed, and why

    def add(self, group: Any, importance: Tensor | None) -> None:
        """Take in a group of Torch-Pruning's: the channels of one layer, and where else they are."""
        first, count, number = len(self._units), len(group[0].idxs), len(self._spaces)
        for forest, more in ((self._units, count), (self._spaces, 1), (self._widths, 1)):
            forest.grow(more)
        self._home += [number] * count
        self._score += [0.0] * count if importance is None else importance.tolist()
        for pair in group.coupled:
            self._together([first + index for index in pair])
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, tp.ops._SliceOp) and cuts_channels(layer):
                start, size = layer.grad_fn._saved_start, layer.grad_fn._saved_self_sym_sizes[1]
                part = f"channels {start} to {min(layer.grad_fn._saved_end, size)} of {size}"
                self._fix([number], f"{self._reader(item.dep.target)} is a slice, {part}")
            for side, size in self._sides(layer, item.dep.handler):
                owner = self._owner.setdefault((layer, side), np.full(size, STAYS, dtype=np.int64))
                indices, roots = np.array(item.idxs), first + np.array(item.root_idxs)
                free = owner[indices] == STAYS
                owner[indices[free]] = roots[free]
                for index in np.flatnonzero(owner[indices] != roots):  # already known as another channel
                    self._together([owner[indices[index]], roots[index]])

    def tie_grouped_convolutions(self) -> None:
        """Tie each group of a grouped convolution together: it goes whole or not at all."""
        for layer in list(self._names):
            if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
                continue
            sides = [self._owner[layer, side] for side in ("in", "out") if (layer, side) in self._owner]
            if len(sides) < 2 or any((side == STAYS).any() for side in sides):
                reason = f"{self._names[layer]} is a grouped convolution of channels of which some cannot be removed"
                self._fix(self._homes(np.concatenate([*sides, [STAYS]])), reason)
                continue
            # Groups must stay equally large, and their channels in step on both sides: one row is one unit.
            for block in np.concatenate([side.reshape(layer.groups, -1) for side in sides], axis=1):
                self._together(block)

    def tie_splits(self) -> None:
        """Tie equal parts of a split to one width, and fix unequal ones, whose sizes stand in the network's code."""
        for (layer, side), owner in self._owner.items():
            if side != "split":
                continue
            parts = [owner[start:end] for start, end in itertools.pairwise(self._offsets(layer))]
            if len({len(part) for part in parts}) > 1 or (owner == STAYS).any():
                sizes, reader = [len(part) for part in parts], self._reader(self._graph.module2node[layer])
                self._fix(self._homes(owner), f"{reader} is split off, in parts of {sizes} channels")
                continue
            # Parts of one layer lose the same channels each; parts of several layers only as many as one another.
            for column in np.stack(parts, axis=1):
                if len(homes := self._homes(column)) == 1:
                    self._together(column)
                else:
                    self._widths.join(homes)

    def numbered(self) -> Channels:
        """The collected channels, numbered in the order of the layers; those that cannot be removed are left out."""
        units, spaces = self._units.roots(), self._spaces.roots()[self._home]  # of each channel
        per_layer, first = self._footprints(units, spaces)
        # All groups of a space share its width, so one fixed group fixes every space of that width.
        for home in range(len(self._spaces)):
            self._widths.join((home, self._spaces.root(home)))
        fixed = {self._widths.root(home) for home in self._fixed}
        widths = self._widths.roots()
        order = [
            space for _, space in sorted((first[space][0], space) for space in first if widths[space] not in fixed)
        ]
        numbers = {width: index for index, width in enumerate(dict.fromkeys(widths[space] for space in order))}
        score, members = np.array(self._score), {}
        for space in order:
            its_units = np.unique(units[spaces == space])
            members[space] = Space(
                name=list(self._names.values())[first[space][0]],
                units=its_units,
                size=first[space][1],
                width=numbers[widths[space]],
                importance=np.array([score[units == unit].mean() for unit in its_units]),
                per_layer=frozenset(per_layer[space]),
            )
        # STAYS once more at the end, where index STAYS = -1 is.
        movable = np.append(np.where(np.isin(spaces, order), units, STAYS), STAYS)
        axes = {key: movable[owner] for key, owner in self._tensor_axes() if (movable[owner] != STAYS).any()}
        full = {space.width: space.channels for space in members.values()}
        output = next((owner for (_, side), owner in self._owner.items() if side == "output"), movable[:0])
        return Channels(
            axes,
            movable[output[output != STAYS]],
            tuple(members.values()),
            tuple(full[index] for index in range(len(full))),
            tuple(dict.fromkeys(self._fixed.values())),
        )

    def _footprints(
        self, units: Indices, spaces: Indices
    ) -> tuple[dict[int, set[tuple[int, int]]], dict[int, tuple[int, int]]]:
        """`Space.per_layer` by space, and the place of the first layer that makes the space, with a unit's channels."""
        per_layer: dict[int, set[tuple[int, int]]] = defaultdict(set)
        first: dict[int, tuple[int, int]] = {}
        for (layer, side), owner in self._owner.items():
            channels = owner[owner != STAYS]
            for space in np.unique(spaces[channels]).tolist():
                _, counts = np.unique(units[channels[spaces[channels] == space]], return_counts=True)
                if len(counts) != len(np.unique(units[spaces == space])) or len(set(counts)) > 1:
                    # How many channels the layer has would depend on which units are kept.
                    self._fix([space], f"{self._names.get(layer, 'a join')} holds an uneven part of coupled channels")
                if side in ("split", "output"):
                    continue
                per_layer[space].add((int(counts[0]), layer.num_groups if isinstance(layer, nn.GroupNorm) else 1))
                if side == "out" and isinstance(layer, nn.Conv2d | nn.Linear):
                    place = (self._places[self._names[layer]], int(counts[0]))
                    first[space] = min(first.get(space, place), place)
        return per_layer, first

    def _sides(self, layer: Any, handler: Any) -> Iterator[tuple[str, int]]:
        """Sides of a layer that an item of a group is about, and their lengths."""
        if isinstance(layer, nn.Parameter):
            yield "out", layer.shape[self._graph.module2node[layer].pruning_dim]
        elif isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
            # Depthwise: what comes in as a channel goes out as the same one.
            yield "in", layer.in_channels
            yield "out", layer.out_channels
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            size_out, size_in = layer.weight.size(0), layer.weight.size(1)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            out = self._graph.is_out_channel_pruning_fn(handler)
            yield ("out", size_out) if out else ("in", size_in * groups)
        elif isinstance(layer, nn.PReLU) and len(layer.weight) == 1:
            return  # one slope for all channels
        elif isinstance(layer, (*_NORMS, nn.PReLU)):
            yield "out", _norm_size(layer)
        elif isinstance(layer, tp.ops._OutputOp):
            yield "output", layer.shape[1]
        elif offsets := self._offsets(layer):
            yield "split", offsets[-1]
        elif layer in self._names:
            raise UsageError(
                f"S0 cannot be narrowed: layer {self._names[layer]} is a {type(layer).__name__}, whose channels cannot "
                "be removed. Give another S0: a convolutional network. Any network can be the teacher."
            )

    def _offsets(self, layer: Any) -> list[int]:
        """Bounds of the parts of channels that a layer splits, or shuffles as a matrix that is transposed."""
        if isinstance(layer, tp.ops._SplitOp):
            return layer.offsets or []
        sizes: list[int] = list(getattr(self._graph.module2node[layer].grad_fn, "_saved_self_sym_sizes", ()))
        if isinstance(layer, tp.ops._ReshapeOp) and len(sizes) == 5:  # [N, C / parts, parts, H, W]
            return [part * sizes[1] for part in range(sizes[2] + 1)]
        return []

    def _tensor_axes(self) -> Iterator[tuple[tuple[str, int], Indices]]:
        """Channels of each index by (tensor, dimension), from those by layer and side."""
        for (layer, side), owner in self._owner.items():
            name = self._names.get(layer, "")
            if isinstance(layer, nn.Parameter):
                yield (name, self._graph.module2node[layer].pruning_dim), owner
            elif isinstance(layer, nn.Conv2d | nn.Linear) and side == "in":
                if getattr(layer, "groups", 1) == 1:  # else a whole group has the same number of inputs as before
                    yield (f"{name}.weight", 1), owner
            elif name:
                tensors = ("weight", "bias", "running_mean", "running_var")
                for tensor in [tensor for tensor in tensors if getattr(layer, tensor, None) is not None] or [""]:
                    yield (f"{name}.{tensor}", 0), owner

    def _together(self, channels: Iterable[int]) -> None:
        self._units.join(channels := list(map(int, channels)))
        self._spaces.join({self._home[channel] for channel in channels})

    def _fix(self, homes: Iterable[int], reason: str) -> None:
        for home in homes:
            self._fixed.setdefault(home, reason)

    def _reader(self, node: Any) -> str:
        """A name for the output of an unnamed operation, by the first layer that reads it."""
        queue, visited = deque([node]), {node}
        while queue:
            node = queue.popleft()
            if name := self._names.get(node.module):
                return f"the input of {name}"
            queue += [reader for reader in node.outputs if reader not in visited]
            visited.update(node.outputs)
        return "the output"

    def _homes(self, owner: Indices) -> set[int]:
        return {self._home[channel] for channel in owner.tolist() if channel != STAYS}

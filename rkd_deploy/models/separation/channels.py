"""Channels of a network that belong together: removed in one layer, gone in all.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) says which layers share their channels: through
additions, concatenations, depthwise convolutions, gates. From it follow

    unit    channels that can only go together: one channel, or a whole group of a grouped convolution
    space   units in one order, shared by every layer that has them, e.g. the output of a residual stage
    width   how many channels of a space are kept; spaces that must stay equally wide share one, e.g. the two halves
            that ShuffleNetV2 splits and joins
"""

from __future__ import annotations

import copy
import itertools
import math
import types
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning as tp
from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.staged import Widths

Indices = npt.NDArray[np.int64]
STAYS = -1
"""In place of a unit: this index is never removed."""

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Space:
    """Units in one order, shared by all layers that have them.

    Attributes:
        name: Path of the first layer that makes its channels.
        units: Numbers of its units, in the order of its channels.
        size: Channels of one unit in that layer.
        width: Index of the width that says how many channels are kept.
        importance: A number for each unit; the more important, the rather it is kept.
        per_layer: For each layer that has the space, how many of its channels one unit is, and what the number of
            its channels must be a multiple of.
    """

    name: str
    units: Indices
    size: int
    width: int
    importance: npt.NDArray[np.float64]
    per_layer: frozenset[tuple[int, int]]

    @property
    def channels(self) -> int:
        """Number of channels of this space before anything is removed."""
        return len(self.units) * self.size

    def step(self, round_to: int) -> int:
        """The least number of channels that is, in every layer, a multiple of `round_to`."""
        units = 1
        for channels, multiple_of in self.per_layer:
            wanted = math.lcm(round_to, multiple_of)
            units = math.lcm(units, wanted // math.gcd(wanted, channels))
        return units * self.size


@dataclass(frozen=True)
class Channels:
    """The removable channels of a network, and which tensors hold them.

    Attributes:
        axes: By (tensor, dimension), the unit of each index, or `STAYS`; a norm without tensors is there as "NAME.".
        output: The unit of each channel that comes out, or `STAYS`.
        spaces: Each unit is in one of them; in the order of the layers.
        widths: Channels of each width before anything is removed.
        fixed: Why the channels of some layers cannot be removed, a reason each; empty where all can.
    """

    axes: dict[tuple[str, int], Indices]
    output: Indices
    spaces: tuple[Space, ...]
    widths: Widths
    fixed: tuple[str, ...] = ()

    def steps(self, round_to: int) -> Widths:
        """Each width is a multiple of this many channels."""
        return tuple(
            math.lcm(*(space.step(round_to) for space in self.spaces if space.width == index))
            for index in range(len(self.widths))
        )


def trace_channels(network: nn.Module, input_size: tuple[int, int]) -> Channels:
    """Find the channels of a network that can be removed, and which of them go together.

    Args:
        network: RGB images to what is used of it; layers that do not run are not narrowed. Left as it is: a copy is run
            once, on the CPU. Its weights decide on the importances alone.
        input_size: Height and width in pixels.

    Raises:
        UsageError: It has a layer whose channels cannot be removed; the message names it.
    """
    network = copy.deepcopy(network).cpu().float().requires_grad_(True)
    with torch.enable_grad():
        graph = _Graph().build_dependency(
            network,
            [torch.zeros(1, 3, *input_size)],  # a bare tensor would be unpacked, and lose its batch
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
    """A number for each channel of a group; None where a layer's shape is not known to Torch-Pruning: all alike then.

    It fails on a convolution of a group for each input that has several outputs. Importances decide which weights are
    inherited, and nothing else.
    """
    grouped = any(
        isinstance(layer := item.dep.target.module, nn.Conv2d)
        and layer.groups == layer.in_channels < layer.out_channels
        and layer.groups > 1
        for item in group
    )
    return None if grouped else importance(group)


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph with exact channel counts, and with a search that visits every channel once.

    The base guesses how many channels an operation gives from the layers around it, and guesses wrong beside slices,
    unequal splits and shuffles. PyTorch's autograd graph knows: every node has the shape of what it gave.
    """

    regrouped = ""
    """The first operation that sees channels as a matrix and is no shuffle, in words."""

    def _trace(self, *args: Any, **kwargs: Any) -> Any:
        nodes = super()._trace(*args, **kwargs)
        for node in nodes.values():
            self.regrouped = self.regrouped or _regrouping(node.grad_fn)
            if node.type == tp.ops.OPTYPE.RESHAPE:
                # The base takes every reshape for a flattening that multiplies the channels, and divides by zero at
                # ShuffleNet's. A feature extractor flattens nothing but 1x1 maps, which keeps the channels, so every
                # reshape passes for element-wise: through a shuffle their number stays right, and not their order.
                node.type = tp.ops.OPTYPE.ELEMENTWISE
            elif node.type == tp.ops.OPTYPE.SPLIT:
                self._describe_split(node)
        return nodes

    def get_out_channels(self, module_or_node: Any) -> Any:
        """Channels of what a layer or operation gives; those of a split's several parts are in its offsets."""
        known = super().get_out_channels(module_or_node)
        if known is not None or not isinstance(module_or_node, tp.dependency.Node):
            return known
        return _channels_of(module_or_node.grad_fn)

    def get_in_channels(self, module_or_node: Any) -> Any:
        """Channels of what a layer or operation takes; a join takes as many as it gives."""
        node_type = getattr(module_or_node, "type", None)
        if node_type == tp.ops.OPTYPE.SPLIT and module_or_node.module.offsets:
            return module_or_node.module.offsets[-1]
        if node_type == tp.ops.OPTYPE.CONCAT:
            return _channels_of(module_or_node.grad_fn)
        return super().get_in_channels(module_or_node)

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Sequence[int]) -> Any:
        """The channels of one layer, and where else they are; `coupled` are those that meet in one place.

        The base searches by whole sets of channels. Where paths overlap in part (a shortcut added to the first channels
        of a wider map, block after block) there are 2^blocks such sets, and it hangs. This search goes on with the
        channels alone that a layer has not been reached with before: each is visited once.
        """
        node = self.module2node[module]
        if isinstance(module, nn.Conv2d) and module.groups == module.out_channels > 1:
            pruning_fn = tp.function.prune_depthwise_conv_out_channels
        start = [tp._helpers._HybridIndex(idx=index, root_idx=index) for index in idxs]
        reached: dict[tuple[int, Any], tuple[Any, dict[Any, None]]] = {}

        def unvisited(dep: Any, indices: Sequence[Any]) -> list[Any]:
            _, visited = reached.setdefault((id(dep.target), dep.handler), (dep, {}))
            new = [index for index in dict.fromkeys(indices) if index not in visited]
            visited.update(dict.fromkeys(new))
            return new

        first = tp.dependency.Dependency(pruning_fn, pruning_fn, source=node, target=node)
        open_ends = [(first, unvisited(first, start))]
        while open_ends:
            arrived, indices = open_ends.pop()
            for dep in arrived.target.dependencies:
                if dep.is_triggered_by(arrived.handler):
                    mapped: Any = indices
                    for mapping in dep.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    if mapped and (new := unvisited(dep, mapped)):
                        open_ends.append((dep, new))
        group = tp.dependency.Group()
        group._DG, group.coupled = self, set()
        for dep, visited in reached.values():
            root_of: dict[int, int] = {}
            for index in visited:
                root = root_of.setdefault(index.idx, index.root_idx)
                if root != index.root_idx:  # two channels of the first layer meet here: Ghost modules have such halves
                    group.coupled.add((root, index.root_idx))
            item = tp._helpers.GroupItem(dep=dep, idxs=list(root_of))
            item.root_idxs = list(root_of.values())
            group._group.append(item)
        return group

    def _describe_split(self, node: Any) -> None:
        """Put a split's parts in order, with their sizes, as the base does not do."""
        grad_fn = node.grad_fn
        sizes = grad_fn._saved_self_sym_sizes
        dim = int(np.array(grad_fn._saved_dim, dtype=np.uint64).astype(np.int64)) % len(sizes)
        if hasattr(grad_fn, "_saved_split_sizes"):
            parts = list(grad_fn._saved_split_sizes)
        else:
            size = grad_fn._saved_split_size
            parts = [min(size, sizes[dim] - start) for start in range(0, sizes[dim], size)]
        readers = {
            number: reader
            for reader in node.outputs
            for function, number in reader.grad_fn.next_functions
            if function is grad_fn
        }
        if dim == 1 and (len(node.outputs) != len(parts) or len(readers) != len(parts)):
            raise UsageError(
                f"S0 cannot be narrowed: it splits {sizes[dim]} channels into {len(parts)} parts (operator "
                f"{grad_fn.name()}), which {len(node.outputs)} layers and operations read; "
                "only parts that are read by one layer each can be followed. Give another S0."
            )
        node.outputs = [readers[number] for number in sorted(readers)] if dim == 1 else node.outputs
        node.grad_fn = types.SimpleNamespace(_saved_dim=dim, _saved_split_sizes=parts)


def _cuts_channels(operation: Any) -> bool:
    """Whether a slice leaves channels out. One that takes all of them goes on doing so when there are fewer."""
    grad_fn = operation.grad_fn
    sizes = grad_fn._saved_self_sym_sizes
    return operation.dim == 1 and not (grad_fn._saved_start == 0 and grad_fn._saved_end >= sizes[1])


def _regrouping(grad_fn: Any) -> str:
    """What an operation does that sees the channels of a map as a matrix, in words; else nothing."""
    before = list(getattr(grad_fn, "_saved_self_sym_sizes", ()))
    after = [list(entry.shape) for entry in getattr(grad_fn, "_input_metadata", ())]
    if len(before) != 4 or len(after) != 1 or len(after[0]) != 5 or after[0][1] * after[0][2] != before[1]:
        return ""
    return f"a map of {before[1]} channels is seen as {after[0][1]} times {after[0][2]}, and not to shuffle them"


def _norm_size(layer: Any) -> int:
    """Channels of a norm or a PReLU; those of a norm without weights and statistics it was told."""
    if layer.weight is not None:
        return len(layer.weight)
    for name in ("num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.normalized_shape[-1])


def _channels_of(grad_fn: Any) -> int | None:
    """Channels of what a node of the autograd graph gave; None where that is not one map or vector."""
    shapes = [entry.shape for entry in getattr(grad_fn, "_input_metadata", ())]
    return int(shapes[0][1]) if len(shapes) == 1 and len(shapes[0]) in (2, 4) else None


class _Forest:
    """Union-find: numbers that were joined have the same root."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def __len__(self) -> int:
        return len(self._parent)

    def grow(self, count: int) -> None:
        self._parent += range(len(self), len(self) + count)

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, items: Iterable[int]) -> None:
        roots = sorted({self.root(item) for item in items})
        for other in roots[1:]:
            self._parent[other] = roots[0]  # the first: numbers stay in the order of the channels

    def roots(self) -> Indices:
        return np.array([self.root(item) for item in range(len(self))], dtype=np.int64)


class _Coupling:
    """Collects which index of which axis is which channel, and which channels go together."""

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
        """A group of Torch-Pruning's: the channels of one layer, and where else they are."""
        first, count, number = len(self._units), len(group[0].idxs), len(self._spaces)
        for forest, more in ((self._units, count), (self._spaces, 1), (self._widths, 1)):
            forest.grow(more)
        self._home += [number] * count
        self._score += [0.0] * count if importance is None else importance.tolist()
        for pair in group.coupled:
            self._together([first + index for index in pair])
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, tp.ops._SliceOp) and _cuts_channels(layer):
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
        """Keep or remove the groups of grouped convolutions whole."""
        for layer in list(self._names):
            if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
                continue
            sides = [self._owner[layer, side] for side in ("in", "out") if (layer, side) in self._owner]
            if len(sides) < 2 or any((side == STAYS).any() for side in sides):
                reason = f"{self._names[layer]} is a grouped convolution of channels of which some cannot be removed"
                self._fix(self._homes(np.concatenate([*sides, [STAYS]])), reason)
                continue
            for block in np.concatenate([side.reshape(layer.groups, -1) for side in sides], axis=1):
                self._together(block)

    def tie_splits(self) -> None:
        """Keep equal parts of a split equally wide, and fix unequal ones: the network's code has their sizes."""
        for (layer, side), owner in self._owner.items():
            if side != "split":
                continue
            parts = [owner[start:end] for start, end in itertools.pairwise(self._offsets(layer))]
            if len({len(part) for part in parts}) > 1 or (owner == STAYS).any():
                sizes, reader = [len(part) for part in parts], self._reader(self._graph.module2node[layer])
                self._fix(self._homes(owner), f"{reader} is split off, in parts of {sizes} channels")
                continue
            for column in np.stack(parts, axis=1):
                if len(homes := self._homes(column)) == 1:
                    self._together(column)
                else:
                    self._widths.join(homes)

    def numbered(self) -> Channels:
        """The collected spaces and axes, without channels that cannot be removed."""
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
        """`Space.per_layer` by space; and the place of the first layer that makes it, with a unit's channels."""
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
        """Axes of a layer that an item of a group is about, and their lengths."""
        if isinstance(layer, nn.Parameter):
            yield "out", layer.shape[self._graph.module2node[layer].pruning_dim]
        elif isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
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
        """Bounds of the parts of channels that are split, or shuffled: seen as a matrix and transposed."""
        if isinstance(layer, tp.ops._SplitOp):
            return layer.offsets or []
        sizes: list[int] = list(getattr(self._graph.module2node[layer].grad_fn, "_saved_self_sym_sizes", ()))
        if isinstance(layer, tp.ops._ReshapeOp) and len(sizes) == 5:  # [N, C / parts, parts, H, W]
            return [part * sizes[1] for part in range(sizes[2] + 1)]
        return []

    def _tensor_axes(self) -> Iterator[tuple[tuple[str, int], Indices]]:
        """The axes by tensor and dimension, from those by layer and side."""
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
        """A name for the output of an unnamed operation: the first layer that reads it."""
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

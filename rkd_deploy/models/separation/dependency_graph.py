"""Torch-Pruning's dependency graph, with exact channel counts and a search that always ends.

Reference: Fang et al. 2023, arXiv 2301.12900; `torch_pruning.DependencyGraph` of https://github.com/VainF/Torch-Pruning
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from rkd_deploy.errors import UsageError, require

tp: Any = require("torch_pruning", "train")


class ChannelGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph with exact channel counts, and with a search that visits every channel once.

    The base guesses how many channels an operation gives from the layers around it, and guesses wrong beside slices,
    unequal splits and shuffles. PyTorch's autograd graph knows: every node has the shape of what it gave.
    """

    regrouped = ""
    """The first operation that sees channels as a matrix and does not shuffle them, in words."""

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
        """Number of channels that a layer or operation gives; those of a split's parts are in its offsets."""
        known = super().get_out_channels(module_or_node)
        if known is not None or not isinstance(module_or_node, tp.dependency.Node):
            return known
        return _channels_of(module_or_node.grad_fn)

    def get_in_channels(self, module_or_node: Any) -> Any:
        """Number of channels that a layer or operation takes; a join takes as many as it gives."""
        node_type = getattr(module_or_node, "type", None)
        if node_type == tp.ops.OPTYPE.SPLIT and module_or_node.module.offsets:
            return module_or_node.module.offsets[-1]
        if node_type == tp.ops.OPTYPE.CONCAT:
            return _channels_of(module_or_node.grad_fn)
        return super().get_in_channels(module_or_node)

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Sequence[int]) -> Any:
        """The group of one layer: its channels, and where else they are; `coupled` are pairs that meet in one place.

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
        """Put the parts of a split in order, with their sizes, as the base class does not do."""
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


def cuts_channels(operation: Any) -> bool:
    """Whether a slice leaves channels out; one that takes all of them does so too when there are fewer."""
    grad_fn = operation.grad_fn
    sizes = grad_fn._saved_self_sym_sizes
    return operation.dim == 1 and not (grad_fn._saved_start == 0 and grad_fn._saved_end >= sizes[1])


def _regrouping(grad_fn: Any) -> str:
    """Says how an operation sees the channels of a map as a matrix; empty where it does not."""
    before = list(getattr(grad_fn, "_saved_self_sym_sizes", ()))
    after = [list(entry.shape) for entry in getattr(grad_fn, "_input_metadata", ())]
    if len(before) != 4 or len(after) != 1 or len(after[0]) != 5 or after[0][1] * after[0][2] != before[1]:
        return ""
    return f"a map of {before[1]} channels is seen as {after[0][1]} times {after[0][2]}, and not to shuffle them"


def _channels_of(grad_fn: Any) -> int | None:
    """Number of channels that a node of the autograd graph gave; None where that is not one map or vector."""
    shapes = [entry.shape for entry in getattr(grad_fn, "_input_metadata", ())]
    return int(shapes[0][1]) if len(shapes) == 1 and len(shapes[0]) in (2, 4) else None

"""Weights that S and its assistants begin with, taken from a trained network: S0, or the teacher that it was cut from.

Within each space (`channels.py`) the trained network's channels are ranked by Torch-Pruning's group magnitude: the L2
norms of everything that reads or writes a channel. S keeps the highest ranks. Each assistant takes up the ranking where
the branch before it has left it, and begins again at the top when it comes to the end: what S already has, its adapter
can use as it is; what S had to leave out is the first that an assistant, which learns what S lacks, can add.

Every layer keeps its channels in the order they had, so S alone computes exactly what the trained network would with
all other channels silenced. Two kinds of layers make that an approximation, a start that training has to mend:
    layer norm (ConvNeXt) takes its mean and variance over the channels that are left;
    a channel shuffle (ShuffleNet) hands a layer as many channels as it reads, but the order behind a reshape is not
    followed (`channels.py`), so that some weights behind it meet other channels than those they were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rkd_deploy.errors import UsageError
from rkd_deploy.models.channels import STAYS, Channels, Indices


@torch.no_grad()
def inherit(branches: Sequence[Mapping[str, Tensor]], source: Mapping[str, Tensor], channels: Channels) -> None:
    """Overwrite the weights of narrower networks by those of the network they were cut from.

    Args:
        branches: State dicts of S, A_1, .. A_k, or of one network, overwritten in place. They are of the topology of
            the trained network, at any widths; tensors that it does not have keep their values.
        source: State dict of the trained network.
        channels: Its channels, with their importances.

    Raises:
        UsageError: A branch narrows a layer in a way of its own.
    """
    ranked = [space.units[np.argsort(-space.importance, kind="stable")] for space in channels.spaces]
    begin = [0] * len(ranked)
    for branch in branches:
        wanted = {name: tensor for name, tensor in branch.items() if name in source}
        selection = _Selection(channels, ranked, begin, wanted)
        for name, tensor in wanted.items():
            tensor.copy_(selection.of(name, source[name], tensor.shape))
        begin = [first + count for first, count in zip(begin, selection.counts, strict=True)]


class _Selection:
    """Which channels one branch keeps, by the shapes that it has."""

    def __init__(
        self, channels: Channels, ranked: Sequence[Indices], begin: Sequence[int], wanted: Mapping[str, Tensor]
    ) -> None:
        self._axes, self._ranked, self._begin = channels.axes, ranked, begin
        self._space_of = {int(unit): number for number, units in enumerate(ranked) for unit in units}
        self.counts = [0] * len(ranked)
        """Of each space, how many units the branch keeps (the most, where its layers differ in that)."""
        for name, tensor in wanted.items():
            for dim, size in enumerate(tensor.shape):
                if len(spaces := self._spaces(name, dim)) == 1:
                    [space] = spaces
                    self.counts[space] = max(self.counts[space], self._count(name, dim, size, space))

    def of(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The part of a tensor of the trained network that has a branch's shape."""
        for dim, size in enumerate(shape):
            if (units := self._axes.get((name, dim))) is not None:
                tensor = tensor.index_select(dim, self._indices(name, dim, size, units).to(tensor.device))
        if tensor.shape != torch.Size(shape):
            raise UsageError(
                f"{name} of a narrowed network has the shape {list(shape)}, and {list(tensor.shape)} is what it could "
                'inherit: its family narrows this layer in a way of its own. Set student.weights = "fresh".'
            )
        return tensor

    def _indices(self, name: str, dim: int, size: int, units: Indices) -> Tensor:
        spaces = self._spaces(name, dim)
        counts = {
            space: self._count(name, dim, size, space) if len(spaces) == 1 else self.counts[space] for space in spaces
        }
        kept = {STAYS}
        for space, count in counts.items():
            kept |= set(np.roll(self._ranked[space], -self._begin[space])[:count].tolist())
        indices = [index for index, unit in enumerate(units.tolist()) if unit in kept]
        return torch.tensor(indices, dtype=torch.int64)

    def _count(self, name: str, dim: int, size: int, space: int) -> int:
        units = self._axes[name, dim]
        each = int((units == self._ranked[space][0]).sum())
        return (size - int((units == STAYS).sum())) // each

    def _spaces(self, name: str, dim: int) -> list[int]:
        units = self._axes.get((name, dim), np.empty(0, dtype=np.int64))
        return sorted({self._space_of[unit] for unit in units.tolist() if unit != STAYS})

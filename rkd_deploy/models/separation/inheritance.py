"""Gives narrowed networks a selection of the weights of the network they were cut from.

A narrowed network's shapes say how many channels of each layer it keeps (`pruning.py`); here it is chosen which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.external import External
from rkd_deploy.models.foreign import plain
from rkd_deploy.models.separation.channels import STAYS, Channels, Indices
from rkd_deploy.models.separation.pruning import Pruned, indices_of
from rkd_deploy.models.stage_run import StageRun
from rkd_deploy.models.staged import FeatureNetwork, Staged


def inherit_weights(
    branches: Sequence[FeatureNetwork],
    source: FeatureNetwork,
    input_size: tuple[int, int],
    shared_stages: int = 0,
) -> None:
    """Overwrite the weights of narrowed networks by a selection of the weights they were cut from.

    Args:
        branches: S, A_1, .., A_k, or S0 alone: each keeps other channels than those before it, as far as they go.
            Stages cut from such a network (`StageRun`) are its last ones.
        source: The trained network.
        input_size: Height and width in pixels.
        shared_stages: First stages that all branches share: what these give, all keep alike.

    Raises:
        UsageError: The family narrows its layers in a way in which weights cannot be inherited.
    """
    network = plain(source.network if isinstance(source, External) else source)
    # Imported here: it needs Torch-Pruning, which a run that inherits nothing does not.
    from rkd_deploy.models.separation.coupling import trace_channels

    channels = trace_channels(network, input_size)
    in_runs = any(isinstance(branch, StageRun) for branch in branches)
    stages = _tensors_of_stages(source, network) if in_runs or shared_stages else []
    states = [
        _state_of_run(branch, stages) if isinstance(branch, StageRun) else _state(branch, source) for branch in branches
    ]
    shared = frozenset(name for names in stages[:shared_stages] for name in names.values())
    inherit(states, network.state_dict(), channels, shared)


def _tensors_of_stages(source: FeatureNetwork, network: nn.Module) -> list[dict[str, str]]:
    """For every stage of the trained network the names of its tensors, as the whole network has them."""
    whole = {id(tensor): name for name, tensor in _named_tensors(network)}
    seen = source.rewrapped(network).parts() if isinstance(source, External) else cast(Staged, network).stages()
    return [{name: whole[id(tensor)] for name, tensor in _named_tensors(stage)} for stage in seen]


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _state_of_run(run: StageRun, stages: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Tensors of the last stages of a narrowed network, by the names that the trained network gives them."""
    own = stages[len(stages) - len(run.stages) :]
    return {
        names[name]: tensor
        for stage, names in zip(run.stages, own, strict=True)
        for name, tensor in stage.state_dict().items()
    }


def _state(branch: FeatureNetwork, source: FeatureNetwork) -> dict[str, Tensor]:
    """Tensors of a narrowed network, by the names that the trained network gives them."""
    if not isinstance(branch, Pruned):
        return branch.state_dict()
    state = branch.backbone.network.state_dict()
    if branch.fc is not None and type(source.fc) is nn.Linear and isinstance(source, External):
        path = next(path for path, module in source.network.named_modules() if module is source.fc)
        state |= {f"{path}.{name}": tensor for name, tensor in branch.fc.state_dict().items()}
    return state


@torch.no_grad()
def inherit(
    branches: Sequence[Mapping[str, Tensor]],
    source: Mapping[str, Tensor],
    channels: Channels,
    shared: Set[str] = frozenset(),
) -> None:
    """Overwrite state dicts of narrower networks by channels of the one they were cut from.

    Args:
        branches: State dicts of S, A_1, .. A_k, or of one network, overwritten in place. They are of the topology of
            the trained network, at any widths; tensors that it does not have keep their values.
        source: State dict of the trained network.
        channels: Channels of the trained network, with their importances.
        shared: Tensors of a trunk: of the channels that are theirs, all branches keep the same.

    Raises:
        UsageError: A branch narrows a layer in a way of its own.
    """
    # S takes the most important units of each space, A_1 those after them, and so on, round and round: branches share
    # a channel only where there are not enough for all.
    ranked = [space.units[np.argsort(-space.importance, kind="stable")] for space in channels.spaces]
    begin = [0] * len(ranked)
    trunk_units = {int(unit) for (name, _), axis in channels.axes.items() if name in shared for unit in axis}
    is_shared = [bool(trunk_units.intersection(space.units.tolist())) for space in channels.spaces]
    for branch in branches:
        wanted = {name: tensor for name, tensor in branch.items() if name in source}
        selection = _Selection(channels, ranked, begin, wanted)
        for name, tensor in wanted.items():
            tensor.copy_(selection.of(name, source[name], tensor.shape))
        counts = zip(begin, selection.counts, is_shared, strict=True)
        begin = [first if stays else first + count for first, count, stays in counts]


class _Selection:
    """Selects the channels that one branch keeps; how many follows from its tensors' shapes."""

    def __init__(
        self, channels: Channels, ranked: Sequence[Indices], begin: Sequence[int], wanted: Mapping[str, Tensor]
    ) -> None:
        self._axes, self._ranked, self._begin = channels.axes, ranked, begin
        self._space_of = {int(unit): number for number, units in enumerate(ranked) for unit in units}
        self.counts = [0] * len(ranked)
        """Number of units that the branch keeps of each space; the most, where its layers differ in that."""
        for name, tensor in wanted.items():
            for dim, size in enumerate(tensor.shape):
                if len(spaces := self._spaces(name, dim)) == 1:
                    [space] = spaces
                    self.counts[space] = max(self.counts[space], self._count(name, dim, size, space))

    def of(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The part of a trained network's tensor that the branch inherits, of the branch's shape."""
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
        selected: set[int] = set()
        for space, channels in counts.items():
            # Rolled: the ranking is taken round and round, and the branch begins where the one before it stopped.
            selected |= set(np.roll(self._ranked[space], -self._begin[space])[:channels].tolist())
        return indices_of(units, selected)

    def _count(self, name: str, dim: int, size: int, space: int) -> int:
        units = self._axes[name, dim]
        each = int((units == self._ranked[space][0]).sum())
        return (size - int((units == STAYS).sum())) // each

    def _spaces(self, name: str, dim: int) -> list[int]:
        units = self._axes.get((name, dim), np.empty(0, dtype=np.int64))
        return sorted({self._space_of[unit] for unit in units.tolist() if unit != STAYS})

"""Structural pruning: a convolutional network at fewer channels, layer by layer the same.

`coupling.py` says which channels go together. From it follow here, without building anything, what the network costs at
any widths, and the narrowed network itself. Shapes depend on how many channels are kept and never on which: that is the
business of `inheritance.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.cost import count
from rkd_deploy.models.external import External
from rkd_deploy.models.separation.channels import STAYS, Channels, Indices
from rkd_deploy.models.separation.trial_run import WAY_OUT, check_untied, used_positions
from rkd_deploy.models.staged import FeatureNetwork, Staged, Widths, he_initialised
from rkd_deploy.models.tracing import ROOT


class Pruner:
    """Narrows one network, and tells what it costs at any widths.

    Args:
        network: RGB images to the output that is used; not changed. Layers that do not run stay as they are.
        input_size: Height and width in pixels.
        output: From a copy of the network and images to the output that is used. Default: the network's answer.

    Attributes:
        channels: Groups of channels that can only be removed together.
        widths: Channels of each width before anything is removed, from the first layer on.

    Raises:
        UsageError: The network cannot be narrowed; the message names the module and the operator.
    """

    def __init__(
        self,
        network: nn.Module,
        input_size: tuple[int, int],
        output: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        self._network = network
        check_untied(network)
        used_at = used_positions(network, input_size, "S0 cannot be narrowed")
        macs = count(network, input_size).macs
        # Imported here: it needs Torch-Pruning, and a family that can be built at other widths does not.
        from rkd_deploy.models.separation.coupling import trace_channels

        try:
            self.channels: Channels = trace_channels(network, input_size, output)
        except UsageError as error:
            if error.__cause__ is not None:  # channels were lost; through an operation that no layer does, perhaps
                _check_cost(
                    macs, sum(weight.numel() * used_at.get(name, 0) for name, weight in network.named_parameters())
                )
            raise
        self.widths: Widths = self.channels.widths
        if not self.widths:
            raise UsageError(f"S0 cannot be narrowed: no channels of it can be removed. {WAY_OUT}")
        self._used_at = used_at
        self._cost_of = _CostOfWidths(network, self.channels, used_at)
        self._cost_within: dict[frozenset[str], _CostOfWidths] = {}
        _check_cost(macs, self.cost(self.widths)[0])
        # What the graph did not show (a size that stands in the code) shows where as much as can be is removed.
        narrowest = self.narrowed(tuple(map(min, self.widths, self.steps(1))))
        used_positions(narrowest, input_size, "S0 cannot be narrowed: with fewer channels it does not run")

    def __deepcopy__(self, memo: Any) -> Pruner:
        """The pruner itself, which never changes: else every copy of a narrowed network would copy the original too."""
        return self

    def steps(self, round_to: int) -> Widths:
        """The step of each width: a multiple of `round_to`, and whole groups of grouped convolutions."""
        return self.channels.steps(round_to)

    def cost(self, widths: Sequence[int]) -> tuple[int, int]:
        """MACs of one image, and parameters, of the network at some widths."""
        return self._cost_of(widths)

    def cost_within(self, widths: Sequence[int], names: frozenset[str]) -> tuple[int, int]:
        """MACs of one image, and parameters, of some layers at some widths.

        Args:
            widths: Widths of the whole network.
            names: Names of these layers' tensors.
        """
        if names not in self._cost_within:
            self._cost_within[names] = _CostOfWidths(self._network, self.channels, self._used_at, names)
        return self._cost_within[names](widths)

    def widths_within(self, names: frozenset[str]) -> tuple[int, ...]:
        """Indices of the widths that these tensors depend on."""
        width_of = {int(unit): space.width for space in self.channels.spaces for unit in space.units}
        units = {int(unit) for (name, _), axis in self.channels.axes.items() if name in names for unit in axis}
        return tuple(sorted({width_of[unit] for unit in units - {STAYS}}))

    def output_channels(self, widths: Sequence[int]) -> int:
        """Channels of the network's output at some widths, before anything is flattened."""
        return self._cost_of.output_channels(widths)

    def narrowed(self, widths: Sequence[int]) -> nn.Module:
        """A copy of the network that keeps the first channels of every space, as many as its width says."""
        selected: set[int] = set()
        for space in self.channels.spaces:
            selected |= set(space.units[: widths[space.width] // space.size].tolist())
        network = copy.deepcopy(self._network)
        for path, module in network.named_modules():
            tensors = {**module._parameters, **module._buffers}
            for name, tensor in tensors.items():
                if tensor is not None:
                    sliced = _sliced(tensor, f"{path}.{name}".removeprefix("."), self.channels, selected)
                    if sliced.shape != tensor.shape:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced)
            _describe(module)
            if (units := self.channels.axes.get((f"{path}.", 0))) is not None and hasattr(module, "num_features"):
                module.num_features = len(indices_of(units, selected))
        return network


class _CostOfWidths:
    """Computes MACs and parameters from the widths alone.

    Every tensor has a size that is a product of its axes', and a layer's MACs are its weights times the positions at
    which they are used.
    """

    def __init__(
        self, network: nn.Module, channels: Channels, used_at: Mapping[str, int], names: Set[str] | None = None
    ) -> None:
        width_of = {int(unit): space.width for space in channels.spaces for unit in space.units}
        stays, shares, tensors = [1], [np.zeros(len(channels.widths))], []  # axis 0 is none: its size is 1
        for name, parameter in network.named_parameters():
            if names is not None and name not in names:
                continue
            axes, rest = [0, 0], 1
            for dim, size in enumerate(parameter.shape):
                units = channels.axes.get((name, dim))
                if units is None:
                    rest *= size
                    continue
                axes[axes.index(0)] = len(stays)
                stays.append(int((units == STAYS).sum()))
                unit_widths = [width_of[int(unit)] for unit in units if unit != STAYS]
                shares.append(np.bincount(unit_widths, minlength=len(channels.widths)) / channels.widths)
            tensors.append((*axes, rest, used_at.get(name, 0)))
        self._stays, self._shares = np.array(stays), np.stack(shares)
        unit_widths = [width_of[int(unit)] for unit in channels.output if unit != STAYS]
        self._output_stays = len(channels.output) - len(unit_widths)
        self._output_shares = np.bincount(unit_widths, minlength=len(channels.widths)) / channels.widths
        self._first, self._second, self._rest, self._used_at = np.array(tensors, dtype=np.int64).T

    def output_channels(self, widths: Sequence[int]) -> int:
        return int(self._output_stays + np.rint(self._output_shares @ np.array(widths)))

    def __call__(self, widths: Sequence[int]) -> tuple[int, int]:
        # Exact: widths are whole units, and rint takes away no more than what the divisions by S0's widths left over.
        sizes = self._stays + np.rint(self._shares @ np.array(widths)).astype(np.int64)
        numel = self._rest * sizes[self._first] * sizes[self._second]
        return int(numel @ self._used_at), int(numel.sum())


def _sliced(tensor: Tensor, name: str, channels: Channels, selected: Set[int]) -> Tensor:
    for dim in range(tensor.dim()):
        if (units := channels.axes.get((name, dim))) is not None:
            tensor = tensor.index_select(dim, indices_of(units, selected).to(tensor.device))
    return tensor.detach()


def indices_of(units: Indices, selected: Set[int]) -> Tensor:
    """Indices of an axis that are left when only the selected units are kept.

    Args:
        units: Unit of each index, or `STAYS`.
        selected: Numbers of the units.
    """
    indices = [index for index, unit in enumerate(units.tolist()) if unit == STAYS or unit in selected]
    return torch.tensor(indices, dtype=torch.int64)


def _describe(module: nn.Module) -> None:
    """Set the channel counts of a layer to those of its tensors."""
    if isinstance(module, nn.Conv2d):
        size_out, size_in = module.weight.shape[:2]
        if module.groups > 1:  # groups go whole: their size stays, and their number shrinks
            module.groups = size_out * module.groups // module.out_channels
        module.in_channels, module.out_channels = size_in * module.groups, size_out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.weight is None else module.weight
        module.num_features = module.num_features if tensor is None else len(tensor)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _check_cost(macs: int, known: int) -> None:
    if macs != known:
        raise UsageError(
            f"S0 cannot be narrowed: of its {macs:,} multiply-adds only {known:,} are in nn.Conv2d and nn.Linear "
            f"layers. {WAY_OUT}"
        )


class Pruned(Staged):
    """A pruned copy of an external network, with a linear head of its own.

    Args:
        origin: The external network, without its head.
        pruner: The pruner of `origin.network`.
        widths: As `Pruner.widths` has them: one for every layer that has channels of its own.
        num_classes: K, or None for a feature extractor without a head.

    Attributes:
        backbone: The pruned copy.
        pruner: What narrows the origin; shared by all copies.
    """

    fc: nn.Linear | None

    def __init__(self, origin: External, pruner: Pruner, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.widths: Widths = tuple(widths)
        self.pruner, self.fixed = pruner, pruner.channels.fixed
        self._origin = (origin,)  # in a tuple: a module would be registered as a part of this one
        self.backbone = origin if self.widths == pruner.widths else origin.rewrapped(pruner.narrowed(widths))
        if self.backbone.channels != self.channels_at(widths):
            raise UsageError(
                f"S0 cannot be narrowed: its last stage, {origin.stages[-1]}, has {self.backbone.channels} channels "
                f"and {self.channels_at(widths)} were expected: it is not what the network's last layers give. Name "
                f"another last stage. {WAY_OUT}"
            )
        self.fc = None if num_classes is None else nn.Linear(self.backbone.channels, num_classes)

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return self.backbone.channels

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Stage maps, at the same resolutions as those of the origin."""
        return self.backbone.features(x_NCHW)

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> Pruned:
        """A network of the same layers with other numbers of channels and fresh weights."""
        # A copy, because at full widths the backbone is the origin itself, whose weights must stay as they are.
        network = copy.deepcopy(Pruned(self._origin[0], self.pruner, widths, num_classes)).float()
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        he_initialised(network)
        return network

    def stages(self) -> tuple[nn.Module, ...]:
        """The network cut after every stage map (`External.parts`)."""
        return self.backbone.parts()

    def widths_before(self, stages: int) -> tuple[int, ...]:
        """Indices of the widths that the first stages depend on."""
        return self.pruner.widths_within(self.tensors_of(stages))

    def channels_after(self, stages: int) -> int:
        """Channels of the map that the first stages give."""
        return self.backbone.stage_channels[stages - 1]

    def tensors_of(self, stages: int) -> frozenset[str]:
        """Names that the origin gives the tensors of its first stages."""
        parts = self._origin[0].parts()[:stages]
        return frozenset(name.removeprefix(f"{ROOT}.") for part in parts for name in part.state_dict())

    def steps(self, round_to: int) -> Widths:
        """The step of each width: a multiple of `round_to`, and whole groups of grouped convolutions."""
        return self.pruner.steps(round_to)

    def channels_at(self, widths: Sequence[int]) -> int:
        """Channels of the last stage map at other widths."""
        return self.pruner.output_channels(widths)


def narrowable(network: FeatureNetwork, input_size: tuple[int, int]) -> Staged:
    """A network that can be built at other widths: S0 itself, or its backbone with a linear head.

    Args:
        network: S0.
        input_size: Height and width in pixels.

    Raises:
        UsageError: S0 cannot be narrowed; the message names the module and the operator.
    """
    if isinstance(network, Staged):
        return network
    if not isinstance(network, External):
        raise UsageError(
            f"S0 cannot be narrowed: nothing is known of the layers of a {type(network).__name__}. {WAY_OUT}"
        )
    origin = network.without_head()
    pruner = Pruner(origin.network, input_size)
    if pruner.output_channels(pruner.widths) != origin.channels and origin.layouts[-1].order == "NCHW":
        # What the network does after its last map by functions stays in its forward: means beside largest values, say,
        # as fastai's heads have them. Not always so, because a graph up to the map looks into norms of other classes.
        pruner = Pruner(origin.network, input_size, origin.last_map)
    return Pruned(origin, pruner, pruner.widths, network.num_classes)

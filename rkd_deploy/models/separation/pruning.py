"""A convolutional network at fewer channels, layer by layer the same: structural pruning.

`channels.py` says which channels go together. From it follow here, without building anything, what the network costs at
any widths, and the narrowed network itself. Shapes depend on how many channels are kept and never on which: that is the
business of `inheritance.py`.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rkd_deploy.errors import UsageError
from rkd_deploy.models.cost import count
from rkd_deploy.models.external import External
from rkd_deploy.models.plain import plain
from rkd_deploy.models.separation.channels import STAYS, Channels, Indices, trace_channels
from rkd_deploy.models.staged import FeatureNetwork, Staged, Widths, he_initialised

WAY_OUT = "Give another S0: a convolutional network. Any network can be the teacher."

# Products of two activations: what attention is made of, and nothing else in an image classifier.
_ATTENTION = ("bmm", "baddbmm", "_scaled_dot_product", "_native_multi_head_attention")


class Pruner:
    """Narrows one network.

    Args:
        network: RGB images to what is used of it; not changed. Layers that do not run stay as they are.
        input_size: Height and width in pixels.

    Attributes:
        channels: Groups of channels that can only be removed together.
        widths: Channels of each width before anything is removed, from the first layer on.

    Raises:
        UsageError: It cannot be narrowed; the message names the module and the operator.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int]) -> None:
        self._network = network
        _check_untied(network)
        used_at = _run(network, input_size, "S0 cannot be narrowed")
        self.channels: Channels = trace_channels(network, input_size)
        self.widths: Widths = self.channels.widths
        if not self.widths:
            raise UsageError(f"S0 cannot be narrowed: no channels of it can be removed. {WAY_OUT}")
        self._cost_of = _CostOfWidths(network, self.channels, used_at)
        self._check_cost(input_size)
        narrowest = self.narrowed(tuple(map(min, self.widths, self.steps(1))))
        _run(narrowest, input_size, "S0 cannot be narrowed: with fewer channels it does not run")

    def __deepcopy__(self, memo: Any) -> Pruner:
        """Itself: it never changes, and every copy of a network that it has narrowed would copy the whole original."""
        return self

    def steps(self, round_to: int) -> Widths:
        """The step of each width: a multiple of `round_to`, and whole groups of grouped convolutions."""
        return self.channels.steps(round_to)

    def _check_cost(self, input_size: tuple[int, int]) -> None:
        macs, known = count(self._network, input_size).macs, self.cost(self.widths)[0]
        if macs != known:
            raise UsageError(
                f"S0 cannot be narrowed: of its {macs:,} multiply-adds only {known:,} are in nn.Conv2d and nn.Linear "
                f"layers. {WAY_OUT}"
            )

    def cost(self, widths: Sequence[int]) -> tuple[int, int]:
        """MACs of one image, and parameters, at these widths."""
        return self._cost_of(widths)

    def output_channels(self, widths: Sequence[int]) -> int:
        """Channels of what comes out of the network, before anything is flattened."""
        return self._cost_of.output_channels(widths)

    def narrowed(self, widths: Sequence[int]) -> nn.Module:
        """A copy with the first so many channels of each width."""
        kept_units: dict[int, None] = {}
        for space in self.channels.spaces:
            kept_units |= dict.fromkeys(space.units[: widths[space.width] // space.size].tolist())
        network = copy.deepcopy(self._network)
        for path, module in network.named_modules():
            tensors = {**module._parameters, **module._buffers}
            for name, tensor in tensors.items():
                if tensor is not None:
                    sliced = _sliced(tensor, f"{path}.{name}".removeprefix("."), self.channels, kept_units)
                    if sliced.shape != tensor.shape:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced)
            _describe(module)
            if (units := self.channels.axes.get((f"{path}.", 0))) is not None and hasattr(module, "num_features"):
                module.num_features = len(indices_of(units, kept_units))
        return network


class _CostOfWidths:
    """MACs and parameters as a function of the widths alone.

    Every tensor has a size that is a product of its axes', and a layer's MACs are its weights times the positions at
    which they are used.
    """

    def __init__(self, network: nn.Module, channels: Channels, used_at: Mapping[str, int]) -> None:
        width_of = {int(unit): space.width for space in channels.spaces for unit in space.units}
        stays, shares, tensors = [1], [np.zeros(len(channels.widths))], []  # axis 0 is none: its size is 1
        for name, parameter in network.named_parameters():
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
        sizes = self._stays + np.rint(self._shares @ np.array(widths)).astype(np.int64)
        numel = self._rest * sizes[self._first] * sizes[self._second]
        return int(numel @ self._used_at), int(numel.sum())


def _sliced(tensor: Tensor, name: str, channels: Channels, kept_units: Mapping[int, Any]) -> Tensor:
    for dim in range(tensor.dim()):
        if (units := channels.axes.get((name, dim))) is not None:
            tensor = tensor.index_select(dim, indices_of(units, kept_units).to(tensor.device))
    return tensor.detach()


def indices_of(units: Indices, kept_units: Mapping[int, Any]) -> Tensor:
    """Indices of an axis that are left when only some units are kept."""
    indices = [index for index, unit in enumerate(units.tolist()) if unit == STAYS or unit in kept_units]
    return torch.tensor(indices, dtype=torch.int64)


def _describe(module: nn.Module) -> None:
    """Make what a layer says of its channels agree with its tensors."""
    if isinstance(module, nn.Conv2d):
        size_out, size_in = module.weight.shape[:2]
        if module.groups > 1:
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


def _check_untied(network: nn.Module) -> None:
    """Refuse layers that share a weight: to go on sharing it, they would have to be narrowed alike."""
    owners: dict[int, str] = {}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), path)
        module, other = (network.get_submodule(name.rpartition(".")[0]) for name in (owner, path))
        if module is not other:  # one module at two paths is one layer
            raise UsageError(f"S0 cannot be narrowed: {owner} and {path} are one weight of two layers. {WAY_OUT}")


def _run(network: nn.Module, input_size: tuple[int, int], complaint: str) -> dict[str, int]:
    """Run a copy without data.

    Returns:
        By the name of each weight of a convolution or linear layer, at how many positions it is used.

    Raises:
        UsageError: It fails; the message names the module and the operator.
    """
    try:
        return _run_on("meta", network, input_size, complaint)
    except UsageError as error:
        if not isinstance(error.__cause__, RuntimeError | NotImplementedError):
            raise
        try:  # a tensor that a forward makes has data, and runs on the CPU alone
            return _run_on("cpu", network, input_size, complaint)
        except UsageError:
            raise error from error.__cause__


def _run_on(device: str, network: nn.Module, input_size: tuple[int, int], complaint: str) -> dict[str, int]:
    shadow = copy.deepcopy(network).to(device).float().eval()
    used_at: Counter[str] = Counter()
    for path, layer in shadow.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(functools.partial(_note_positions, used_at, f"{path}.weight"))
        elif type(layer) is nn.BatchNorm2d:  # without data it runs as a dozen operators, half of the time here
            layer.forward = functools.partial(_as_it_is, layer.num_features)  # type: ignore[method-assign]
    tracker, operators = ModuleTracker(), _Operators()
    with tracker:
        try:
            with torch.no_grad(), operators:
                shadow(torch.zeros(1, 3, *input_size, device=device))
        except _AttentionError:
            reason, cause = "attention: transformers cannot be narrowed", None
        except _ValueError:
            reason, cause = "it reads a value of a map, and chooses its way by it: no graph can be made of that", None
        except Exception as error:  # whatever a foreign forward raises
            reason, cause = " ".join(str(error).split()), error
        else:
            return used_at
        where = max(tracker.parents - {"Global"}, key=lambda name: name.count("."), default=type(network).__name__)
    raise UsageError(f"{complaint}: module {where}, operator {operators.latest} ({reason}). {WAY_OUT}") from cause


def _as_it_is(channels: int, x_NCHW: Tensor) -> Tensor:
    if x_NCHW.shape[1] != channels:
        raise ValueError(f"batch norm of {channels} channels is given {x_NCHW.shape[1]}")
    return x_NCHW


def _note_positions(used_at: Counter[str], name: str, layer: nn.Conv2d | nn.Linear, _: Any, y: Tensor) -> None:
    used_at[name] += y.numel() // layer.weight.shape[0]


class _AttentionError(Exception):
    """The network multiplies activations with each other."""


class _ValueError(Exception):
    """The network reads a value of a tensor."""


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the latest operator, and stops at attention and where values are read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.latest = "none"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the name of an operator and run it, unless it is attention's."""
        self.latest = func.overloadpacket.__name__
        if self.latest.startswith(_ATTENTION):
            raise _AttentionError
        if self.latest == "_local_scalar_dense":
            raise _ValueError
        return func(*args, **(kwargs or {}))


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
    # S takes the most important units of each space, A_1 those after them, and so on, round and round: branches share
    # a channel only where there are not enough for all.
    ranked = [space.units[np.argsort(-space.importance, kind="stable")] for space in channels.spaces]
    begin = [0] * len(ranked)
    for branch in branches:
        wanted = {name: tensor for name, tensor in branch.items() if name in source}
        selection = _Selection(channels, ranked, begin, wanted)
        for name, tensor in wanted.items():
            tensor.copy_(selection.of(name, source[name], tensor.shape))
        begin = [first + count for first, count in zip(begin, selection.counts, strict=True)]


class _Selection:
    """The channels that one branch keeps, worked out from its tensors' shapes."""

    def __init__(
        self, channels: Channels, ranked: Sequence[Indices], begin: Sequence[int], wanted: Mapping[str, Tensor]
    ) -> None:
        self._axes, self._ranked, self._begin = channels.axes, ranked, begin
        self._space_of = {int(unit): number for number, units in enumerate(ranked) for unit in units}
        self.counts = [0] * len(ranked)
        """Number of units that the branch keeps, by space (the most, where its layers differ in that)."""
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
        kept_units = {STAYS}
        for space, channels in counts.items():
            kept_units |= set(np.roll(self._ranked[space], -self._begin[space])[:channels].tolist())
        indices = [index for index, unit in enumerate(units.tolist()) if unit in kept_units]
        return torch.tensor(indices, dtype=torch.int64)

    def _count(self, name: str, dim: int, size: int, space: int) -> int:
        units = self._axes[name, dim]
        each = int((units == self._ranked[space][0]).sum())
        return (size - int((units == STAYS).sum())) // each

    def _spaces(self, name: str, dim: int) -> list[int]:
        units = self._axes.get((name, dim), np.empty(0, dtype=np.int64))
        return sorted({self._space_of[unit] for unit in units.tolist() if unit != STAYS})


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
        """The stage maps, at the same resolutions as those of the origin."""
        return self.backbone.features(x_NCHW)

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> Pruned:
        """A network of the same layers with other numbers of channels and fresh weights."""
        network = copy.deepcopy(Pruned(self._origin[0], self.pruner, widths, num_classes)).float()
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        he_initialised(network)
        return network

    def steps(self, round_to: int) -> Widths:
        """`round_to`, and whole groups of grouped convolutions."""
        return self.pruner.steps(round_to)

    def channels_at(self, widths: Sequence[int]) -> int:
        """Channels of the last stage map at other widths."""
        return self.pruner.output_channels(widths)


def narrowable(network: FeatureNetwork, input_size: tuple[int, int]) -> Staged:
    """S0 as a network that can be built at other widths: itself, or its backbone with a head of its own.

    Args:
        network: S0.
        input_size: Height and width in pixels.

    Raises:
        UsageError: It cannot be narrowed; the message names the module and the operator.
    """
    if isinstance(network, Staged):
        return network
    if not isinstance(network, External):
        raise UsageError(
            f"S0 cannot be narrowed: nothing is known of the layers of a {type(network).__name__}. {WAY_OUT}"
        )
    origin = network.without_head()
    pruner = Pruner(origin.network, input_size)
    return Pruned(origin, pruner, pruner.widths, network.num_classes)


def inherit_weights(branches: Sequence[FeatureNetwork], source: FeatureNetwork, input_size: tuple[int, int]) -> None:
    """Overwrite the weights of narrowed networks by a selection of those they were cut from (`inheritance.py`).

    Args:
        branches: S, A_1, .., A_k, or S0 alone: each keeps other channels than those before it, as far as they go.
        source: The trained network.
        input_size: Height and width in pixels.

    Raises:
        UsageError: The family narrows its layers in a way in which weights cannot be inherited.
    """
    network = plain(source.network if isinstance(source, External) else source)
    channels = trace_channels(network, input_size)
    inherit([_state(branch, source) for branch in branches], network.state_dict(), channels)


def _state(branch: FeatureNetwork, source: FeatureNetwork) -> dict[str, Tensor]:
    """The tensors of a narrowed network by the names that the trained one gives them."""
    if not isinstance(branch, Pruned):
        return branch.state_dict()
    state = branch.backbone.network.state_dict()
    if branch.fc is not None and type(source.fc) is nn.Linear and isinstance(source, External):
        path = next(path for path, module in source.network.named_modules() if module is source.fc)
        state |= {f"{path}.{name}": tensor for name, tensor in branch.fc.state_dict().items()}
    return state

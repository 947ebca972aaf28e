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
from rkd_deploy.models.channels import STAYS, Channels, Indices, trace_channels
from rkd_deploy.models.cost import count

Widths = tuple[int, ...]

WAY_OUT = "Give another S0: a convolutional network. Any network can be the teacher."

# Products of two activations: what attention is made of, and nothing else in an image classifier.
_ATTENTION = ("bmm", "baddbmm", "_scaled_dot_product", "_native_multi_head_attention")


class Pruner:
    """Narrows one network.

    Args:
        network: RGB images to what is used of it; not changed. Layers that do not run stay as they are.
        input_size: Height and width in pixels.

    Attributes:
        channels: Which of them go together.
        widths: Channels of each width before anything is removed, from the first layer on.

    Raises:
        UsageError: It cannot be narrowed; the message names the module and the operator.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int]) -> None:
        self._network = network
        used_at = _run(network, input_size, "S0 cannot be narrowed")
        self.channels: Channels = trace_channels(network, input_size)
        self.widths: Widths = self.channels.widths
        if not self.widths:
            raise UsageError(f"S0 cannot be narrowed: no channels of it can be removed. {WAY_OUT}")
        self._prices = _Prices(network, self.channels, used_at)
        self._check_prices(input_size)
        narrowest = self.narrowed(tuple(map(min, self.widths, self.steps(1))))
        _run(narrowest, input_size, "S0 cannot be narrowed: with fewer channels it does not run")

    def __deepcopy__(self, memo: Any) -> Pruner:
        """Itself: it never changes, and every copy of a network that it has narrowed would copy the whole original."""
        return self

    def steps(self, round_to: int) -> Widths:
        """What each width is a multiple of: `round_to`, and whole groups of grouped convolutions."""
        return self.channels.steps(round_to)

    def _check_prices(self, input_size: tuple[int, int]) -> None:
        macs, known = count(self._network, input_size).macs, self.cost(self.widths)[0]
        if macs != known:
            raise UsageError(
                f"S0 cannot be narrowed: of its {macs:,} multiply-adds only {known:,} are in nn.Conv2d and nn.Linear "
                f"layers. {WAY_OUT}"
            )

    def cost(self, widths: Sequence[int]) -> tuple[int, int]:
        """MACs of one image, and parameters, at these widths."""
        return self._prices(widths)

    def output_channels(self, widths: Sequence[int]) -> int:
        """Channels of what comes out of the network, before anything is flattened."""
        return self._prices.output_channels(widths)

    def narrowed(self, widths: Sequence[int]) -> nn.Module:
        """A copy with the first so many channels of each width."""
        kept: dict[int, None] = {}
        for space in self.channels.spaces:
            kept |= dict.fromkeys(space.units[: widths[space.width] // space.size].tolist())
        network = copy.deepcopy(self._network)
        for path, module in network.named_modules():
            own = {**module._parameters, **module._buffers}
            for name, tensor in own.items():
                if tensor is not None:
                    sliced = _sliced(tensor, f"{path}.{name}".removeprefix("."), self.channels, kept)
                    if sliced.shape != tensor.shape:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced)
            _describe(module)
        return network


class _Prices:
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
                own = [width_of[int(unit)] for unit in units if unit != STAYS]
                shares.append(np.bincount(own, minlength=len(channels.widths)) / channels.widths)
            tensors.append((*axes, rest, used_at.get(name, 0)))
        self._stays, self._shares = np.array(stays), np.stack(shares)
        own = [width_of[int(unit)] for unit in channels.output if unit != STAYS]
        self._output_stays = len(channels.output) - len(own)
        self._output_shares = np.bincount(own, minlength=len(channels.widths)) / channels.widths
        self._first, self._second, self._rest, self._used_at = np.array(tensors, dtype=np.int64).T

    def output_channels(self, widths: Sequence[int]) -> int:
        return int(self._output_stays + np.rint(self._output_shares @ np.array(widths)))

    def __call__(self, widths: Sequence[int]) -> tuple[int, int]:
        sizes = self._stays + np.rint(self._shares @ np.array(widths)).astype(np.int64)
        numel = self._rest * sizes[self._first] * sizes[self._second]
        return int(numel @ self._used_at), int(numel.sum())


def _sliced(tensor: Tensor, name: str, channels: Channels, kept: Mapping[int, Any]) -> Tensor:
    for dim in range(tensor.dim()):
        if (units := channels.axes.get((name, dim))) is not None:
            tensor = tensor.index_select(dim, indices_of(units, kept).to(tensor.device))
    return tensor.detach()


def indices_of(units: Indices, kept: Mapping[int, Any]) -> Tensor:
    """Which indices of an axis are left when some units are kept."""
    indices = [index for index, unit in enumerate(units.tolist()) if unit == STAYS or unit in kept]
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


def _run(network: nn.Module, input_size: tuple[int, int], complaint: str) -> dict[str, int]:
    """Run a copy without data.

    Returns:
        By the name of each weight of a convolution or linear layer, at how many positions it is used.

    Raises:
        UsageError: It fails; the message names the module and the operator.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
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
                shadow(torch.empty(1, 3, *input_size, device="meta"))
        except _AttentionError:
            reason = "attention: transformers cannot be narrowed"
        except Exception as error:  # whatever a foreign forward raises
            reason = " ".join(str(error).split())
        else:
            return used_at
        where = max(tracker.parents - {"Global"}, key=lambda name: name.count("."), default=type(network).__name__)
    raise UsageError(f"{complaint}: module {where}, operator {operators.latest} ({reason}). {WAY_OUT}")


def _as_it_is(channels: int, x_NCHW: Tensor) -> Tensor:
    if x_NCHW.shape[1] != channels:
        raise ValueError(f"batch norm of {channels} channels is given {x_NCHW.shape[1]}")
    return x_NCHW


def _note_positions(used_at: Counter[str], name: str, layer: nn.Conv2d | nn.Linear, _: Any, y: Tensor) -> None:
    used_at[name] += y.numel() // layer.weight.shape[0]


class _AttentionError(Exception):
    """The network multiplies activations with each other."""


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the latest operator, and stops at attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.latest = "none"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        self.latest = func.overloadpacket.__name__
        if self.latest.startswith(_ATTENTION):
            raise _AttentionError
        return func(*args, **(kwargs or {}))

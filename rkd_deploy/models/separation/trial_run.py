"""Runs a network once to see whether it can be narrowed, and at how many positions each layer works."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rkd_deploy.errors import UsageError

WAY_OUT = "Give another S0: a convolutional network. Any network can be the teacher."


# Products of two activations: what attention is made of, and nothing else in an image classifier.
_ATTENTION = ("bmm", "baddbmm", "_scaled_dot_product", "_native_multi_head_attention")


def check_untied(network: nn.Module) -> None:
    """Refuse layers that share a weight: to go on sharing it, they would have to be narrowed alike."""
    owners: dict[int, str] = {}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), path)
        module, other = (network.get_submodule(name.rpartition(".")[0]) for name in (owner, path))
        if module is not other:  # one module at two paths is one layer
            raise UsageError(f"S0 cannot be narrowed: {owner} and {path} are one weight of two layers. {WAY_OUT}")


def used_positions(network: nn.Module, input_size: tuple[int, int], complaint: str) -> dict[str, int]:
    """Run a copy of a network without data.

    Returns:
        Number of positions at which each weight of a convolution or linear layer is used, by the weight's name.

    Raises:
        UsageError: The run fails; the message names the module and the operator.
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
    """Raised where a network multiplies activations with each other, as attention does."""


class _ValueError(Exception):
    """The network reads a value of a tensor."""


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operator that ran last, and stops at attention and where values are read."""

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

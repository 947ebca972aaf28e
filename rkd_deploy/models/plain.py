"""Brings a foreign network's weights to what everything here takes: float32, each a tensor of its own layer."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rkd_deploy.errors import UsageError


def check_real(network: nn.Module, name: str) -> None:
    """Refuse complex weights.

    Args:
        network: Any module.
        name: What messages call it.

    Raises:
        UsageError: It has some; the message names the first.
    """
    for path, tensor in network.state_dict().items():
        if tensor.is_complex():
            raise UsageError(
                f"{name} has complex weights ({path}, {tensor.dtype}), which no file format and no runtime here takes. "
                "Write it with real ones: a product of complex numbers is four of real ones."
            )


def with_current_norms(network: nn.Module, name: str) -> nn.Module:
    """The network with the hooks of torch.nn.utils.weight_norm, which is deprecated, replaced by parametrisations.

    What a hook computes is no weight that could be copied. State dicts of before still load.

    Args:
        network: Changed in place.
        name: What messages call it.

    Raises:
        UsageError: It has hooks of torch.nn.utils.spectral_norm, whose state dicts would not load any more.
    """
    for path, module in list(network.named_modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                raise UsageError(
                    f"{name}: layer {path} has the hook of torch.nn.utils.spectral_norm, which is deprecated and "
                    "cannot be copied. Use torch.nn.utils.parametrizations.spectral_norm."
                )
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
                parametrizations.weight_norm(module, hook.name, hook.dim)
    return network


def plain(network: nn.Module) -> nn.Module:
    """The network with float32 weights and without parametrisations, e.g. weight norm: each gives its result for good.

    Args:
        network: Left as it is.

    Returns:
        A copy, or the network itself where it is so already.
    """
    parametrised = any(parametrize.is_parametrized(module) for module in network.modules())
    tensors = (*network.parameters(), *network.buffers())
    if not parametrised and all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return network
    network = copy.deepcopy(network).float()
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            # Not remove_parametrizations: it takes the weight away from the class, which the original shares.
            weights = {
                name: getattr(module, name).detach().clone() for name in cast(nn.ModuleDict, module.parametrizations)
            }
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight))
    return network

"""Adapters to the teacher's channels: a 1x1 convolution and batch norm, folded at export.

    P f = g (U f - mean) / sqrt(var + eps) + beta          U [C_T, C] at every position; g, beta, mean, var [C_T]
        = U' f + c                                         U' = diag(g / sqrt(var + eps)) U
                                                           c  = beta - g mean / sqrt(var + eps)

Batch norm uses the statistics of the batch while P learns and its running ones afterwards, so P is linear in use and
folds exactly. That a projector needs it, and needs no non-linearity, is the finding of Miles and Mikolajczyk
("Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024, arXiv 2303.11098).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """An adapter P, from the channels of a map to those of T's map.

    Args:
        in_channels: C.
        channels: C_T.
        silent: Start at P f = 0, as an assistant does: the sum then starts at S.
    """

    def __init__(self, in_channels: int, channels: int, *, silent: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        if silent:
            nn.init.zeros_(self.norm.weight)

    def forward(self, f_NCHW: Tensor) -> Tensor:
        """The adapted map P f, [N, C_T, H, W]."""
        return cast(Tensor, self.norm(self.conv(f_NCHW)))

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The convolution U' with bias c, equal to P in eval mode."""
        norm, U = self.norm, self.conv.weight
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv = nn.Conv2d(U.shape[1], U.shape[0], 1, dtype=U.dtype, device=U.device)
        conv.weight.copy_(U * scale[:, None, None, None])
        cast(Tensor, conv.bias).copy_(norm.bias - scale * norm.running_mean)
        return conv


def as_convolution(adapter: nn.Module) -> nn.Conv2d:
    """The 1x1 convolution that an adapter is at inference; a plain convolution as it is."""
    return adapter.folded() if isinstance(adapter, Adapter) else cast(nn.Conv2d, adapter)


def with_norms(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Convert a state dict from before adapters had batch norm to one that a module with adapters takes.

    Args:
        state: Tensors by name; one that names batch norms already is given back as it is.
        module: What will load it.

    Returns:
        Each plain convolution as U, with a batch norm that adds its bias and changes nothing else.
    """
    weights = dict(state)
    for name, adapter in module.named_modules():
        if isinstance(adapter, Adapter) and f"{name}.weight" in weights:
            bias = weights.pop(f"{name}.bias")
            weights[f"{name}.conv.weight"] = weights.pop(f"{name}.weight")
            weights[f"{name}.norm.bias"] = bias
            weights[f"{name}.norm.weight"] = torch.ones_like(bias)
            weights[f"{name}.norm.running_mean"] = torch.zeros_like(bias)
            # Batch norm divides by sqrt(var + eps): with this variance by exactly 1.
            weights[f"{name}.norm.running_var"] = torch.full_like(bias, 1 - adapter.norm.eps)
    return weights

"""Adapters a second time, by matrices, and adapters as they might be after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_deploy.models.residual import Adapter


def learnt(adapter: Adapter, std: float = 1.0) -> Adapter:
    """Every number of it random, statistics too: as it might be after training."""
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)
    assert adapter.norm.running_mean is not None
    assert adapter.norm.running_var is not None
    nn.init.normal_(adapter.norm.running_mean)
    nn.init.uniform_(adapter.norm.running_var, 0.5, 2)
    return adapter


def adapted(adapter: Any, f_NCHW: Tensor, *, training: bool = False) -> Tensor:
    """P f by the formula: with the statistics of these maps in training, else with its running ones."""
    m = torch.einsum("oc,nchw->nohw", adapter.conv.weight[:, :, 0, 0], f_NCHW)
    norm = adapter.norm
    mean, var = norm.running_mean, norm.running_var
    if training:
        mean = m.mean((0, 2, 3))
        var = (m - mean[:, None, None]).square().mean((0, 2, 3))
    m = (m - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
    return norm.weight[:, None, None] * m + norm.bias[:, None, None]

"""The adapters between two stages of a progressive student, for export (letters of `rkd_deploy.models.progressive`).

As they are trained, with P_b f = U_b f + c_b and Q_b s = V_b s + d_b at every position (V = 1 and d = 0 for no Q):

    s = sum_b (U_b f_b + c_b)                       input of branch a: V_a s + d_a

Nothing but a sum lies between them, so they fold:

    V_a s + d_a = sum_b (V_a U_b) f_b + (V_a sum_b c_b + d_a)

one matrix [C_S + C_A, C_S + C_A] on the concatenated maps, instead of two to T's channels and two back: fewer
multiply-adds wherever S and A together are narrower than about twice T. Where they are wider, the adapters stay.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from rkd_deploy.models.progressive import ProgressiveStudent, Step


def joined(adapters: Sequence[nn.Conv2d]) -> tuple[Tensor, Tensor]:
    """[U_S | U_1 | ..] and c_S + c_1 + .. of 1x1 convolutions whose results are summed."""
    U = torch.cat([adapter.weight.flatten(1) for adapter in adapters], dim=1)
    return U, torch.stack([cast(Tensor, adapter.bias) for adapter in adapters]).sum(0)


class ExchangingBranches(nn.Module):
    """Images to the last maps of all branches.

    Args:
        model: Its layers are used, not copied.
        folded: Fold the adapters between stages where that is no dearer.
    """

    def __init__(self, model: ProgressiveStudent, *, folded: bool) -> None:
        super().__init__()
        rows = model.rows()
        self.stages = nn.ModuleList(nn.ModuleList(step.stage for step in row) for row in rows)
        self.exchanges = nn.ModuleList(
            _Folded(*pair) if folded and _cheaper(*pair) else _AsTrained(*pair) for pair in pairwise(rows)
        )

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """f_S^K, f_1^K, .."""
        stages = cast("list[nn.ModuleList]", list(self.stages))
        maps = tuple(stage(x_NCHW) for stage in stages[0])
        for exchange, row in zip(self.exchanges, stages[1:], strict=True):
            maps = tuple(stage(s) for stage, s in zip(row, exchange(maps), strict=True))
        return maps


class _AsTrained(nn.Module):
    """Sum over branches, then back to the width of each."""

    def __init__(self, before: list[Step], after: list[Step]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(step.adapter for step in before)
        self.backs = nn.ModuleList(step.back for step in after)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        s = functools.reduce(operator.add, (adapter(f) for adapter, f in zip(self.adapters, maps, strict=True)))
        return tuple(back(s) for back in self.backs)


class _Folded(nn.Module):
    """One 1x1 convolution on the concatenated maps, its result split again."""

    def __init__(self, before: list[Step], after: list[Step]) -> None:
        super().__init__()
        U, c = joined([step.adapter for step in before])
        V, d = zip(*(_linear(step.back, c) for step in after), strict=True)
        self.widths = [len(rows) for rows in V]
        self.conv = nn.Conv2d(U.shape[1], sum(self.widths), 1, dtype=U.dtype, device=U.device)
        with torch.no_grad():
            self.conv.weight.copy_((torch.cat(V) @ U)[:, :, None, None])
            cast(Tensor, self.conv.bias).copy_(torch.cat(V) @ c + torch.cat(d))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = torch.split(self.conv(torch.cat(maps, dim=1)), self.widths, dim=1)
        return tuple(inputs[number] for number in range(len(self.widths)))  # the tracer cannot iterate over them


def _linear(back: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """V and d of Q; `like` has C_T numbers."""
    if isinstance(back, nn.Conv2d):
        return back.weight.flatten(1), cast(Tensor, back.bias)
    return torch.eye(len(like), dtype=like.dtype, device=like.device), torch.zeros_like(like)


def _cheaper(before: list[Step], after: list[Step]) -> bool:
    own = sum(step.adapter.in_channels for step in before)
    as_trained = sum(step.adapter.weight.numel() for step in before)
    as_trained += sum(step.back.weight.numel() for step in after if isinstance(step.back, nn.Conv2d))
    following = sum(_linear(step.back, cast(Tensor, before[0].adapter.bias))[0].shape[0] for step in after)
    return own * following <= as_trained

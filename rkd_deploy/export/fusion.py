"""S and A as one graph, equal in value to h(GAP(P_S f_S + P_A f_A)).

Letters: s = f_S(x) [N, C_S, H, W], a = f_A(x) [N, C_A, H, W], GAP the mean over H and W, and
    P_S s = U_S s + c_S     U_S [C_T, C_S] at every position
    P_A a = U_A a + c_A     U_A [C_T, C_A]
    h(v)  = W v + b         W   [K, C_T]

Level `sum` is the paper's picture, maps added, pooled, classified:

    z = W GAP(U_S s + c_S + U_A a + c_A) + b

Level `tail` uses that GAP, adapters and head are all linear and so commute:

    z = W (U_S GAP(s) + c_S + U_A GAP(a) + c_A) + b
      = [W U_S | W U_A] [GAP(s); GAP(a)]  +  (b + W (c_S + c_A))

One matrix [K, C_S + C_A] on the concatenated pooled maps is left: the adapters cost nothing at run time, and the sum of
maps no longer exists, so it cannot be an output. Any number of branches is folded alike: a chain of k assistants adds
columns W U_1 .. W U_k and shifts W c_1 .. W c_k; with one branch (S alone) both levels are the same without A.

Level `wide` has the tail of `tail`, and each pair of layers of S and A as one (`wide.py`): half as many operations, and
as many multiplications more as the weights got zeros. With p_S, p_A the places of their channels in the merged map m,

    z = V GAP(m) + (b + W (c_S + c_A)),    V[:, p_S] = W U_S,  V[:, p_A] = W U_A

`wide-grouped` is the same with grouped convolutions, which have no zeros, wherever the pair has equal widths. Which
level is fastest depends on the machine, on the batch and on the widths: level `auto` measures (`selection.py`).

A head h that is no single matrix keeps its place: the adapters fold into one matrix with W = 1, b = 0, and h follows.

Batch norm is folded into the convolution before it in every level (w' = w g / sd, b' = beta - mean g / sd, with g and
beta its affine parameters and sd its standard deviation), by PyTorch's own fuser. One that follows an addition (in a
Wide ResNet) stays: the other reader of that sum needs it without the norm, and the ReLU after it keeps it from the next
convolution. It is one operation, per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_batch_norm

from rkd_deploy.errors import UsageError, unknown_name
from rkd_deploy.export.wide import Merged, merge
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.staged import Staged, pool

LEVELS = ("sum", "tail", "wide", "wide-grouped")


class SummedBranches(nn.Module):
    """Level `sum`.

    Args:
        backbones: Images to last maps.
        adapters: 1x1 convolutions to C_T channels, one for each backbone.
        head: C_T to K.
    """

    def __init__(self, backbones: Sequence[nn.Module], adapters: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.backbones, self.adapters, self.head = nn.ModuleList(backbones), nn.ModuleList(adapters), head

    def summed_map(self, x_NCHW: Tensor) -> Tensor:
        """P_S f_S + P_1 f_1 + .., [N, C_T, H', W']."""
        maps = [adapter(backbone(x_NCHW)) for backbone, adapter in zip(self.backbones, self.adapters, strict=True)]
        total = maps[0]
        for further in maps[1:]:
            total = total + further
        return cast(Tensor, total)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.head(pool(self.summed_map(x_NCHW))))


class FoldedTail(nn.Module):
    """Level `tail`.

    Args:
        backbones: Images to last maps.
        adapters: 1x1 convolutions to C_T channels, one for each backbone.
        head: C_T to K.
    """

    def __init__(self, backbones: Sequence[nn.Module], adapters: Sequence[nn.Conv2d], head: nn.Module) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)
        columns, bias = _folded(adapters, head)
        self.head = _with_rest(_linear(torch.cat(columns, dim=1), bias), head)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        pooled = [pool(backbone(x_NCHW)) for backbone in self.backbones]
        return cast(Tensor, self.head(torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0]))


class WideBranches(nn.Module):
    """Level `wide`.

    Args:
        merged: All backbones as one.
        adapters: 1x1 convolutions to C_T channels, one for each backbone.
        head: C_T to K.
    """

    def __init__(self, merged: Merged, adapters: Sequence[nn.Conv2d], head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.can_group = merged.backbone, merged.can_group
        columns, bias = _folded(adapters, head)
        V = columns[0].new_zeros(len(columns[0]), merged.channels)
        for p, folded in zip(merged.p, columns, strict=True):
            V[:, p] = folded
        self.head = _with_rest(_linear(V, bias), head)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.head(pool(self.backbone(x_NCHW))))


def _folded(adapters: Sequence[nn.Conv2d], head: nn.Module) -> tuple[list[Tensor], Tensor]:
    """W U_S, W U_1, .. and b + W (c_S + c_1 + ..); where h is no single matrix, W = 1 and b = 0."""
    with torch.no_grad():
        U = [adapter.weight.flatten(1) for adapter in adapters]
        c = torch.stack([cast(Tensor, adapter.bias) for adapter in adapters]).sum(0)
        if not isinstance(head, nn.Linear):
            return U, c
        return [head.weight @ U_i for U_i in U], head.bias + head.weight @ c


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def _with_rest(linear: nn.Linear, head: nn.Module) -> nn.Module:
    return linear if isinstance(head, nn.Linear) else nn.Sequential(linear, head)


class _LastMap(nn.Module):
    """A backbone as a function from images to its last stage map."""

    def __init__(self, backbone: Staged) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.backbone.features(x_NCHW)[-1]


def fuse(model: nn.Module, level: str = "tail") -> nn.Module:
    """One network to export, in eval mode, equal in value to the model's up to rounding.

    Args:
        model: S with its assistants (`ResidualStudent`), S alone (`StudentAlone`), or any classifier, of which only
            batch norm is folded. Left as it is.
        level: One of `LEVELS`. `auto` is no level of a network but a choice: see `selection.choose_level`.

    Raises:
        UsageError: Unknown level, or a level that these branches cannot be brought to.
    """
    if level not in LEVELS:
        raise UsageError(unknown_name("fusion level", level, LEVELS))
    if not isinstance(model, ResidualStudent | StudentAlone):
        return _without_norms(model.eval())
    with torch.no_grad():
        return _FUSERS[level](model.eval()).eval()


def _summed(model: ResidualStudent | StudentAlone) -> nn.Module:
    backbones = [_without_norms(_LastMap(backbone)) for backbone, _ in model.branches()]
    return SummedBranches(backbones, [adapter for _, adapter in model.branches()], model.head)


def _tail(model: ResidualStudent | StudentAlone) -> nn.Module:
    backbones = [_without_norms(_LastMap(backbone)) for backbone, _ in model.branches()]
    return FoldedTail(backbones, [adapter for _, adapter in model.branches()], model.head)


def _wide(model: ResidualStudent | StudentAlone, *, grouped: bool = False) -> nn.Module:
    merged = merge([_LastMap(backbone) for backbone, _ in model.branches()], grouped=grouped)
    return WideBranches(merged, [adapter for _, adapter in model.branches()], model.head)


_FUSERS: dict[str, Callable[[ResidualStudent | StudentAlone], nn.Module]] = {
    "sum": _summed,
    "tail": _tail,
    "wide": _wide,
    "wide-grouped": partial(_wide, grouped=True),
}


def _without_norms(network: nn.Module) -> nn.Module:
    """Batch norm folded, where the network can be traced; the ONNX exporter folds what is left."""
    try:
        return fold_batch_norm(network.eval())
    except Exception:  # symbols break a forward that looks at values in any way that Python code can break
        return network

"""Fuses S and A into one graph, equal in value to h(GAP(P_S f_S + P_A f_A)).

Letters: s = f_S(x) [N, C_S, H, W], a = f_A(x) [N, C_A, H, W], GAP the mean over H and W, and
    P_S s = U_S s + c_S     U_S [C_T, C_S] at every position, the batch norm of P folded in (`models/residual.py`)
    P_A a = U_A a + c_A     U_A [C_T, C_A]
    h(v)  = W v + b         W   [K, C_T]

Level `sum` is the paper's picture, maps added, pooled, classified:

    z = W GAP(U_S s + c_S + U_A a + c_A) + b

Level `tail` uses that GAP, adapters and head are all linear and so commute:

    z = W (U_S GAP(s) + c_S + U_A GAP(a) + c_A) + b
      = [W U_S | W U_A] [GAP(s); GAP(a)]  +  (b + W (c_S + c_A))

One matrix [K, C_S + C_A] on the concatenated pooled maps is left: the adapters cost nothing at run time, and the sum of
maps no longer exists, so it cannot be an output. Any number of branches is folded alike: a chain of k assistants adds
columns W U_1 .. W U_k and shifts W c_1 .. W c_k; with one branch (S alone) both levels are the same without A. Where S
and A exchange their maps at every stage (scheme progressive), level `tail` folds those adapters too: a stage's maps s_b
are summed at T's width and brought back to the width of each branch, with Q_b s = V_b s + d_b, so that

    Q_b (sum_i U_i s_i + c_i) = V_b [U_S | U_1 | ..] [s_S; s_1; ..]  +  (V_b c + d_b),    c = c_S + c_1 + ..

is one 1x1 convolution on the concatenated maps. It is taken where its matrix is no larger than those that it replaces.

Level `wide` has the tail of `tail`, and each pair of layers of S and A as one (`wide.py`): half as many operations, and
as many multiplications more as the weights got zeros. With p_S, p_A the places of their channels in the merged map m,

    z = V GAP(m) + (b + W (c_S + c_A)),    V[:, p_S] = W U_S,  V[:, p_A] = W U_A

`wide-grouped` is the same with grouped convolutions, which have no zeros, wherever the pair has equal widths. Which
level is fastest depends on the machine, on the batch and on the widths: level `auto` measures (`export/levels.py`).

Batch norm is folded into the convolution before it in every level (`batch_norm.py`); where a network cannot be traced,
or has a batch norm of its own making, that is left to the ONNX exporter. One that follows an addition (in a Wide
ResNet) stays: the other reader of that sum needs it without the norm, and the ReLU after it keeps it from the next
convolution. It is one operation, per channel.

A head that is not linear (T's norm or perceptron before its linear layer) cannot take the adapters in. GAP and adapters
still commute, so level `tail` applies the adapters to the pooled maps, where they cost H W times less, and then h:

    z = h([U_S | U_A] [GAP(s); GAP(a)] + c_S + c_A)
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError, unknown_name
from rkd_deploy.export.fusion.batch_norm import fold_batch_norms
from rkd_deploy.export.fusion.wide import Merged, merge
from rkd_deploy.models.progressive import BranchStage, ProgressiveStudent
from rkd_deploy.models.residual import ResidualStudent, StudentAlone, as_convolution
from rkd_deploy.models.staged import FeatureNetwork, pool


def concatenated(adapters: Sequence[nn.Conv2d]) -> tuple[Tensor, Tensor]:
    """Matrix [U_S | U_1 | ..] and shift c_S + c_1 + .. of 1x1 convolutions whose results are summed."""
    U = torch.cat([adapter.weight.flatten(1) for adapter in adapters], dim=1)
    return U, torch.stack([cast(Tensor, adapter.bias) for adapter in adapters]).sum(0)


class ProgressiveBranches(nn.Module):
    """Branches that exchange their maps after every stage (scheme progressive): images to all last maps.

    Args:
        model: S and A; its layers are used, not copied.
        fold_stage_adapters: Whether the adapters between two stages become one convolution where that is no dearer.
    """

    def __init__(self, model: ProgressiveStudent, *, fold_stage_adapters: bool) -> None:
        super().__init__()
        rows = model.rows()
        self.stages = nn.ModuleList(nn.ModuleList(step.stage for step in row) for row in rows)
        self.exchanges = nn.ModuleList(
            _FoldedStageAdapters(*pair) if fold_stage_adapters and _cheaper(*pair) else _StageAdapters(*pair)
            for pair in pairwise(rows)
        )

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Last maps f_S, f_1, .. of all branches, each [N, C_b, H', W']."""
        stages = cast("list[nn.ModuleList]", list(self.stages))
        maps = tuple(stage(x_NCHW) for stage in stages[0])
        for exchange, row in zip(self.exchanges, stages[1:], strict=True):
            maps = tuple(stage(s) for stage, s in zip(row, exchange(maps), strict=True))
        return maps


class _StageAdapters(nn.Module):
    """The exchange as it was trained: the sum over branches, then back to the width of each."""

    def __init__(self, before: list[BranchStage], after: list[BranchStage]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(step.adapter for step in before)
        self.backs = nn.ModuleList(step.back for step in after)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        s = functools.reduce(operator.add, (adapter(f) for adapter, f in zip(self.adapters, maps, strict=True)))
        return tuple(back(s) for back in self.backs)


class _FoldedStageAdapters(nn.Module):
    """The exchange as one 1x1 convolution on the concatenated maps, its result split again."""

    def __init__(self, before: list[BranchStage], after: list[BranchStage]) -> None:
        super().__init__()
        U, c = concatenated([step.adapter for step in before])
        V, d = zip(*(_back_matrix(step.back, c) for step in after), strict=True)
        self.widths = [len(rows) for rows in V]
        self.conv = nn.Conv2d(U.shape[1], sum(self.widths), 1, dtype=U.dtype, device=U.device)
        with torch.no_grad():
            self.conv.weight.copy_((torch.cat(V) @ U)[:, :, None, None])
            cast(Tensor, self.conv.bias).copy_(torch.cat(V) @ c + torch.cat(d))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = torch.split(self.conv(torch.cat(maps, dim=1)), self.widths, dim=1)
        return tuple(inputs[number] for number in range(len(self.widths)))  # the tracer cannot iterate over them


def _back_matrix(back: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """V and d of Q_b; the identity where a branch has T's width already. `like` has C_T numbers."""
    if isinstance(back, nn.Conv2d):
        return back.weight.flatten(1), cast(Tensor, back.bias)
    return torch.eye(len(like), dtype=like.dtype, device=like.device), torch.zeros_like(like)


def _cheaper(before: list[BranchStage], after: list[BranchStage]) -> bool:
    # All of these are 1x1 convolutions at the same positions, so that weights stand for multiply-adds. The product of
    # two matrices is larger than both where what lies between them, T's width, is narrow beside all branches together.
    width = sum(step.adapter.in_channels for step in before)
    as_trained = sum(step.adapter.weight.numel() for step in before)
    as_trained += sum(step.back.weight.numel() for step in after if isinstance(step.back, nn.Conv2d))
    following = sum(_back_matrix(step.back, cast(Tensor, before[0].adapter.bias))[0].shape[0] for step in after)
    return width * following <= as_trained


LEVELS = ("sum", "tail", "wide", "wide-grouped")


class SummedBranches(nn.Module):
    """Level `sum`: adapters, their sum, pooling and head, as they were trained.

    Args:
        branches: Images to the last maps of all branches.
        adapters: 1x1 convolutions to C_T channels, one for each map.
        head: C_T to K.
    """

    def __init__(self, branches: nn.Module, adapters: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.branches, self.adapters, self.head = branches, nn.ModuleList(adapters), head

    def summed_map(self, x_NCHW: Tensor) -> Tensor:
        """P_S f_S + P_1 f_1 + .., [N, C_T, H', W']."""
        maps = [adapter(f) for adapter, f in zip(self.adapters, self.branches(x_NCHW), strict=True)]
        return cast(Tensor, functools.reduce(operator.add, maps))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, K]."""
        return cast(Tensor, self.head(pool(self.summed_map(x_NCHW))))


class FoldedTail(nn.Module):
    """Level `tail`: the maps are pooled and concatenated, and one matrix is left of adapters and head.

    Args:
        branches: Images to the last maps of all branches.
        adapters: 1x1 convolutions to C_T channels, one for each map.
        head: C_T to K.
    """

    def __init__(self, branches: nn.Module, adapters: Sequence[nn.Conv2d], head: nn.Module) -> None:
        super().__init__()
        self.branches = branches
        tail = _tail(adapters, head)
        self.head: nn.Module = tail if len(tail) > 1 else tail[0]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, K]."""
        pooled = [pool(f) for f in self.branches(x_NCHW)]
        return cast(Tensor, self.head(torch.cat(pooled, dim=1)))


class TrunkAndStudent(FoldedTail):
    """Level `tail` of S alone, behind a trunk whose map is given too, for the assistants: z_0 and t.

    Args:
        branches: Images to S's last map and the trunk's.
        adapters: P_S.
        head: C_T to K.
    """

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map normalised images [N, C, H, W] to logits [N, K] and the trunk's map [N, C', H', W']."""
        student_map, trunk_map = self.branches(x_NCHW)
        return self.head(pool(student_map)), trunk_map


class WideBranches(nn.Module):
    """Level `wide`: all branches as one backbone, with the tail of level `tail`.

    Args:
        merged: All backbones as one.
        adapters: 1x1 convolutions to C_T channels, one for each backbone.
        head: C_T to K.
    """

    def __init__(self, merged: Merged, adapters: Sequence[nn.Conv2d], head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.can_group = merged.backbone, merged.can_group
        tail = _tail(adapters, head)
        first = cast(nn.Linear, tail[0])
        # The merged map has the channels in its own order: the columns of the matrix are moved there, once, instead of
        # the map being gathered at every call.
        V = first.weight.new_zeros(first.out_features, merged.channels)
        V[:, torch.cat(merged.p)] = first.weight
        tail[0] = _linear(V, first.bias)
        self.head: nn.Module = tail if len(tail) > 1 else tail[0]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, K]."""
        return cast(Tensor, self.head(pool(self.backbone(x_NCHW))))


def _tail(adapters: Sequence[nn.Conv2d], head: nn.Module) -> nn.Sequential:
    """The layers from all pooled maps, concatenated, to logits: one matrix, and h after it where h is not linear."""
    U, c = concatenated(adapters)
    if type(head) is not nn.Linear:
        return nn.Sequential(_linear(U, c), head)
    W, b = head.weight, head.bias
    return nn.Sequential(_linear(W @ U, W @ c if b is None else b + W @ c))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class _LastMaps(nn.Module):
    """Branches as one function from images to their last stage maps, and, if asked for, the trunk's behind them."""

    def __init__(
        self, backbones: Sequence[FeatureNetwork], trunk: FeatureNetwork | None, *, shows_trunk: bool = False
    ) -> None:
        super().__init__()
        self.trunk, self.backbones, self.shows_trunk = trunk, nn.ModuleList(backbones), shows_trunk

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        if self.trunk is not None:
            x_NCHW = self.trunk.features(x_NCHW)[-1]
        maps = tuple(backbone.features(x_NCHW)[-1] for backbone in self.backbones)  # type: ignore[operator]
        return (*maps, x_NCHW) if self.shows_trunk else maps


class _LastMap(nn.Module):
    """A branch as a function from images to its last stage map."""

    def __init__(self, backbone: FeatureNetwork) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.backbone.features(x_NCHW)[-1]


def fuse(model: nn.Module, level: str = "tail") -> nn.Module:
    """Bring a network to a fusion level: one network to export, in eval mode, equal in value up to rounding.

    Args:
        model: S with its assistants (`ResidualStudent`, `ProgressiveStudent`), S alone, or any classifier, of which
            only batch norm is folded. Left as it is.
        level: One of `LEVELS`. `auto` is no level of a network but a choice: see `levels.choose_level`.

    Raises:
        UsageError: Unknown level, or a level that these branches cannot be brought to.
    """
    if level not in LEVELS:
        raise UsageError(unknown_name("fusion level", level, LEVELS))
    if level.startswith("wide") and isinstance(model, ResidualStudent | StudentAlone | ProgressiveStudent):
        return _wide(model, grouped=level == "wide-grouped")
    branches: nn.Module
    if isinstance(model, ProgressiveStudent):
        branches, adapters = ProgressiveBranches(model, fold_stage_adapters=level == "tail"), model.last_adapters()
    elif isinstance(model, ResidualStudent | StudentAlone):
        branches = _LastMaps([backbone for backbone, _ in model.branches()], model.trunk)
        adapters = [as_convolution(adapter) for _, adapter in model.branches()]
    else:
        return fold_batch_norms(model.eval())
    # The adapters come with their norms folded in; the norms inside of the branches are folded here, in every level.
    kind = SummedBranches if level == "sum" else FoldedTail
    return kind(fold_batch_norms(branches.eval()), adapters, model.head).eval()


def _wide(model: ResidualStudent | StudentAlone | ProgressiveStudent, *, grouped: bool) -> nn.Module:
    if isinstance(model, ProgressiveStudent):
        raise UsageError(
            "Level wide cannot merge the branches: they exchange their maps at every stage (scheme progressive). "
            "Use --fuse tail, which folds the adapters between them and is equal in value."
        )
    backbones = [_LastMap(backbone).eval() for backbone, _ in model.branches()]
    with torch.no_grad():
        if model.trunk is None:
            merged = merge(backbones, grouped=grouped)
        else:  # the ends are merged, and share their input, the trunk's map, as branches share the image
            merged = merge(backbones, grouped=grouped, channels=model.trunk.channels)
            trunk = fold_batch_norms(_LastMap(model.trunk).eval())
            merged = dataclasses.replace(merged, backbone=nn.Sequential(trunk, merged.backbone))
        adapters = [as_convolution(adapter) for _, adapter in model.branches()]
        return WideBranches(merged, adapters, model.head).eval()


def fuse_branch(model: ResidualStudent, number: int, head: nn.Module) -> nn.Module:
    """One branch alone at level `tail`, in eval mode: images to h(U GAP(f) + c).

    Behind a trunk S's gives the trunk's map beside its logits, and an assistant's takes that in place of the images.

    Args:
        model: S with its assistants; left as it is.
        number: b = 0 (S), 1, ..
        head: h.
    """
    backbone, adapter = model.branches()[number]
    trunk = model.trunk if number == 0 else None
    maps = fold_batch_norms(_LastMaps([backbone], trunk, shows_trunk=trunk is not None).eval())
    kind = FoldedTail if trunk is None else TrunkAndStudent
    return kind(maps, [as_convolution(adapter)], head).eval()

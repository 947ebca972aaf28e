"""S and its assistants exchange maps: the sum of stage k feeds stage k + 1.

    s_0   = x, the image
    f_b^k = stage k of branch b on Q_b^k s_{k-1}             b = S, A_1, .. A_n; Q_b^1 = identity
    s_k   = P_S^k f_S^k + sum_i P_i^k f_i^k                  [N, C_T^k, H', W'], the approximation of T's map f_T^k
    z     = h(GAP(s_K))

The progressive scheme of residual knowledge distillation (Gao, Shen, Li, Loy, arXiv 2002.09168), of which the public
part of the paper has the name alone; that the integrated map feeds the next block is recalled of it, the adapters are
this project's. P are 1x1 convolutions to T's channels, as in `residual.py`; Q are 1x1 convolutions back to the
branch's, and the identity where it has as many as T. All of them ship, so the budget counts all of them
(`adapter_cost`). Nothing lies between P and Q but a sum, so at export the two fold into one matrix
(`rkd_deploy.export.fusion`).

T and S0 need not have the same number of stages: maps are paired from the deepest. Where T has more, its first are left
out; where S0 has more, its first are one with the first that has a partner.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from rkd_deploy.models.staged import Staged, pool, stage_shapes

MapShape = tuple[int, int, int]


class BranchStage(nn.Module):
    """Stage k of one branch, with its adapters: what one phase trains.

    Args:
        back: Q, from s_{k-1} to the input of the stage.
        stage: To f_b^k.
        adapter: P, to C_T^k channels.
    """

    def __init__(self, back: nn.Module, stage: nn.Module, adapter: nn.Conv2d) -> None:
        super().__init__()
        self.back, self.stage, self.adapter = back, stage, adapter

    def map(self, s_NCHW: Tensor) -> Tensor:
        """The map f_b^k of this branch alone, from s_{k-1}."""
        return cast(Tensor, self.stage(self.back(s_NCHW)))

    def forward(self, s_NCHW: Tensor) -> Tensor:
        """The adapted map P_b^k f_b^k, [N, C_T^k, H', W'], from s_{k-1}."""
        return cast(Tensor, self.adapter(self.map(s_NCHW)))


class ProgressiveStudent(nn.Module):
    """S, its assistants, all adapters and the head: the network that ships.

    Args:
        steps: For each k = 1 .. K the steps of S, A_1, .. A_n, in this order.
        head: h, from C_T^K to the classes.
    """

    def __init__(self, steps: Sequence[Sequence[BranchStage]], head: nn.Linear) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.ModuleList(row) for row in steps)
        self.head = head

    def rows(self) -> list[list[BranchStage]]:
        """The steps of every stage k, those of S, A_1, .. A_n in this order."""
        return [cast("list[BranchStage]", list(row)) for row in cast("list[nn.ModuleList]", list(self.steps))]

    def summed_map(self, x_NCHW: Tensor, stages: int | None = None) -> Tensor:
        """The sum s_k after k = `stages` stages; s_0 is the image. Default: after the last."""
        s = x_NCHW
        for row in self.rows()[:stages]:
            s = _sum([step(s) for step in row])
        return s

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Maps f_S^1 .. f_S^K of S alone, as borrowed losses see them."""
        maps, s = [], x_NCHW
        for student, *assistants in self.rows():
            maps.append(student.map(s))
            s = _sum([student.adapter(maps[-1]), *(step(s) for step in assistants)])
        return tuple(maps)

    def last_adapters(self) -> list[nn.Conv2d]:
        """Adapters P_S^K, P_1^K, .. of the last stage."""
        return [step.adapter for step in self.rows()[-1]]

    def alone(self) -> ProgressiveStudent:
        """S without its assistants, of the same layers: every sum holds S's map alone.

        S has learnt from sums that hold them, so this is what S is worth without its assistants, and not what a
        student trained alone would be.
        """
        return ProgressiveStudent([row[:1] for row in self.rows()], self.head)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images [N, 3, H, W]."""
        return cast(Tensor, self.head(pool(self.summed_map(x_NCHW))))


def progressive_student(
    student: Staged,
    assistants: Sequence[Staged],
    channels: Sequence[int],
    num_classes: int,
    image_size: Sequence[int],
) -> ProgressiveStudent:
    """Cut S and its assistants into stages and join those by adapters.

    Args:
        student: S, without a head; its layers are used, not copied.
        assistants: A_1 .. A_n, as S.
        channels: C_T^1 .. C_T^K, the deepest maps of T that have a partner (`paired_channels`).
        num_classes: Number of classes K of the head.
        image_size: Height and width in pixels.

    Raises:
        UsageError: S cannot be cut into stages.
    """
    branches = [_steps(branch, channels, image_size) for branch in (student, *assistants)]
    for steps in branches[1:]:
        for step in steps:  # an assistant adds exactly nothing before it has learnt: every sum starts at S
            for parameter in step.adapter.parameters():
                nn.init.zeros_(parameter)
    return ProgressiveStudent(list(zip(*branches, strict=True)), nn.Linear(channels[-1], num_classes))


def paired_channels(teacher: Sequence[MapShape], student: Sequence[MapShape]) -> list[int]:
    """Channels C_T^1 .. C_T^K of T's maps that have a partner among S0's, from the (C, H, W) of both."""
    return [shape[0] for shape in teacher[-min(len(teacher), len(student)) :]]


def adapter_cost(maps: Sequence[MapShape], channels: Sequence[int], unit: str) -> int:
    """The cost of all P and Q of one branch.

    Args:
        maps: (C, H, W) of the branch's stage maps.
        channels: C_T^1 .. C_T^K.
        unit: ``"macs"`` or ``"params"``.
    """
    total = 0
    for number, (shape, C_T) in enumerate(zip(maps[-len(channels) :], channels, strict=True), 1):
        C, height, width = shape
        positions = height * width if unit == "macs" else 1
        biases = 0 if unit == "macs" else 1
        total += positions * C * C_T + biases * C_T  # P
        if number < len(channels) and C != C_T:
            total += positions * C_T * C + biases * C  # Q of the next stage
    return total


def _steps(branch: Staged, channels: Sequence[int], image_size: Sequence[int]) -> list[BranchStage]:
    stages, branch_channels = branch.stages(), [shape[0] for shape in stage_shapes(branch, image_size)]
    early = len(stages) - len(channels)
    stages, branch_channels = (nn.Sequential(*stages[: early + 1]), *stages[early + 1 :]), branch_channels[early:]
    backs: list[nn.Module] = [nn.Identity()]
    for C_T, C in zip(channels[:-1], branch_channels[:-1], strict=True):
        backs.append(nn.Identity() if C == C_T else nn.Conv2d(C_T, C, 1))
    adapters = [nn.Conv2d(C, C_T, 1) for C, C_T in zip(branch_channels, channels, strict=True)]
    return [BranchStage(*parts) for parts in zip(backs, stages, adapters, strict=True)]


def _sum(maps: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, maps)

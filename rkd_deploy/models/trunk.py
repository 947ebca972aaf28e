"""S and A on a shared trunk: S0's first j stages once, S and A as the ends behind it.

    t   = trunk(x)                                           stages 1 .. j
    f_S = S(t),  f_i = A_i(t)                                stages j + 1 .. K of each
    z   = h(GAP(P_S f_S + P_1 f_1 + ..))

Two branches from the image on compute the same early features twice, each with half of the filters. What S leaves over
is of the late stages (ERA, Yan et al., arXiv 2508.16050, puts all of A behind the last one; ResKD, Li et al., arXiv
2006.04719, has whole networks); where they part is `shared_stages`. An image that S answers early has paid for the
trunk and S alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.stage_run import StageRun
from rkd_deploy.models.staged import Staged


def parted(
    student: Staged,
    assistants: Sequence[Staged],
    shared_stages: int,
    channels: int,
    num_classes: int,
    head: nn.Module | None = None,
) -> ResidualStudent:
    """Join S and its assistants on one trunk, the first stages of S.

    Args:
        student: S, whose first stages become the trunk; their layers are used, not copied.
        assistants: A_1 .. A_k, whose first stages have the trunk's widths and are left out.
        shared_stages: j, at least 1, less than the number of stages.
        channels: C_T.
        num_classes: K.
        head: h. Default: a fresh linear layer.

    Raises:
        UsageError: These networks cannot be cut there.
    """
    stages = student.stages()
    check_parting(shared_stages, len(stages), type(student).__name__)
    trunk = StageRun(stages[:shared_stages], student.channels_after(shared_stages))
    ends = [StageRun(network.stages()[shared_stages:], network.channels) for network in (student, *assistants)]
    return ResidualStudent(ends[0], ends[1:], channels, num_classes, head, trunk)


def check_parting(shared_stages: int, stages: int, name: str) -> None:
    """Refuse a place where nothing is shared, or nothing is left to part.

    Raises:
        UsageError: S and A would share no stage, or all of them.
    """
    if not 1 <= shared_stages < stages:
        raise UsageError(
            f"student.shared_stages = {shared_stages}: {name} has {stages} stages, so S and A can share 1 to "
            f"{stages - 1} of them."
        )

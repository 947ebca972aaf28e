"""FitNets' hints (Romero et al., ICLR 2015, arXiv 1412.6550), in one phase.

The paper trains up to the hint first; every table since adds the hint to the loss, as is done here:

    L = MSE(f_T, R f_S)  at one stage in the middle,   R = ReLU(BN(1x1 convolution to T's channels))

Published protocol (RepDistiller, mdistiller): CE + 100 L at the second stage. There R is a 3x3 or a transposed
convolution where the maps differ in size; here the larger map is average-pooled, so that R is the same for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rkd_deploy.errors import RecipeError
from rkd_deploy.train.methods.base import BaseLoss, View, match_size


class FitNet(BaseLoss):
    """FitNets' L at one stage, with its regressor R.

    Args:
        teacher: (C, H, W) of T's stage maps.
        student: (C, H, W) of S's stage maps.
        stage: Number of the stage, from 1.

    Raises:
        RecipeError: There is no such stage.
    """

    weight = 100.0

    def __init__(
        self, teacher: Sequence[tuple[int, int, int]], student: Sequence[tuple[int, int, int]], stage: int
    ) -> None:
        super().__init__()
        stages = min(len(teacher), len(student))
        if stage > stages:
            raise RecipeError(
                f"method.hint_stage = {stage}; T and S both have stages 1 to {stages}: choose one of these."
            )
        self.index = stage - 1
        C_T, C_S = teacher[self.index][0], student[self.index][0]
        self.regressor = nn.Sequential(nn.Conv2d(C_S, C_T, 1), nn.BatchNorm2d(C_T), nn.ReLU())

    def forward(self, teacher: View, student: View, y_N: Tensor) -> Tensor:
        """L = MSE(f_T, R f_S) of a batch."""
        f_T, f_S = match_size(teacher.maps[self.index], student.maps[self.index])
        return mse_loss(self.regressor(f_S), f_T)

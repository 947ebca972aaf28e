"""Some consecutive stages of a network: a trunk, or one of the ends behind it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from rkd_deploy.models.staged import FeatureNetwork


class StageRun(FeatureNetwork):
    """Stages one after the other: images, or the map before the first of them, to the map after each.

    Args:
        stages: As `Staged.stages` gives them; their layers are used, not copied.
        channels: Channels of the last map.
    """

    fc: None

    def __init__(self, stages: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.fc = None
        self._channels = channels

    @property
    def channels(self) -> int:
        """Channels of the last map."""
        return self._channels

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The map after each stage of this run."""
        maps = []
        for stage in self.stages:
            x_NCHW = stage(x_NCHW)
            maps.append(x_NCHW)
        return tuple(maps)

    def without_head(self) -> FeatureNetwork:
        """A copy of the run, which has no head."""
        return copy.deepcopy(self)


def joined(*runs: StageRun) -> StageRun:
    """Join runs that follow each other into one, of the same layers."""
    return StageRun([stage for run in runs for stage in run.stages], runs[-1].channels)

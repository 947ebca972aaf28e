"""Values that say which channels of a network can only be removed together.

    unit    channels that can only go together: one channel, or a whole group of a grouped convolution
    space   units in one order, shared by every layer that has them, e.g. the output of a residual stage
    width   how many channels of a space are kept; spaces that must stay equally wide share one, e.g. the two halves
            that ShuffleNetV2 splits and joins

`coupling.py` finds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rkd_deploy.models.staged import Widths

Indices = npt.NDArray[np.int64]
STAYS = -1
"""Stands for a unit where an index is never removed."""


@dataclass(frozen=True)
class Space:
    """Units of channels in one order, shared by all layers that have them.

    Attributes:
        name: Path of the first layer that makes its channels.
        units: Numbers of the units, in the order of their channels.
        size: Channels of one unit in that layer.
        width: Index of the width that says how many channels are kept.
        importance: A number for each unit; the more important, the rather it is kept.
        per_layer: For each layer that has the space, how many of its channels one unit is, and what the number of
            its channels must be a multiple of.
    """

    name: str
    units: Indices
    size: int
    width: int
    importance: npt.NDArray[np.float64]
    per_layer: frozenset[tuple[int, int]]

    @property
    def channels(self) -> int:
        """Number of channels of the space before anything is removed."""
        return len(self.units) * self.size

    def step(self, round_to: int) -> int:
        """Least number of channels that is a multiple of `round_to` in every layer of the space."""
        units = 1
        for channels, multiple_of in self.per_layer:
            wanted = math.lcm(round_to, multiple_of)
            units = math.lcm(units, wanted // math.gcd(wanted, channels))
        return units * self.size


@dataclass(frozen=True)
class Channels:
    """The removable channels of a network, and which tensors hold them.

    Attributes:
        axes: The unit of each index, or `STAYS`, by (tensor, dimension); a norm without tensors is there as "NAME.".
        output: The unit of each channel that comes out, or `STAYS`.
        spaces: Each unit is in one of them; in the order of the layers.
        widths: Channels of each width before anything is removed.
        fixed: Why the channels of some layers cannot be removed, a reason each; empty where all can.
    """

    axes: dict[tuple[str, int], Indices]
    output: Indices
    spaces: tuple[Space, ...]
    widths: Widths
    fixed: tuple[str, ...] = ()

    def steps(self, round_to: int) -> Widths:
        """The step of each width, in channels: every narrowed width is a multiple of it."""
        return tuple(
            math.lcm(*(space.step(round_to) for space in self.spaces if space.width == index))
            for index in range(len(self.widths))
        )

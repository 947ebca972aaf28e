"""What a network's channels are, once it is known which of them belong together: values, and their rules.

unit    channels that can only go together: one channel, or a whole group of a grouped convolution
space   units in one order, shared by every layer that has them, e.g. the output of a residual stage
width   how many channels of a space are kept; spaces that must stay equally wide share one, e.g. the two halves
that ShuffleNetV2 splits and joins
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rkd_deploy.models.staged import Widths

Indices = npt.NDArray[np.int64]
STAYS = -1
"""In place of a unit: this index is never removed."""


@dataclass(frozen=True)
class Space:
    """Units in one order, shared by all layers that have them.

    Attributes:
        name: Path of the first layer that makes its channels.
        units: Numbers of its units, in the order of its channels.
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
        """Number of channels of this space before anything is removed."""
        return len(self.units) * self.size

    def step(self, round_to: int) -> int:
        """The least number of channels that is, in every layer, a multiple of `round_to`."""
        units = 1
        for channels, multiple_of in self.per_layer:
            wanted = math.lcm(round_to, multiple_of)
            units = math.lcm(units, wanted // math.gcd(wanted, channels))
        return units * self.size


@dataclass(frozen=True)
class Channels:
    """The removable channels of a network, and which tensors hold them.

    Attributes:
        axes: By (tensor, dimension), the unit of each index, or `STAYS`.
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
        """Each width is a multiple of this many channels."""
        return tuple(
            math.lcm(*(space.step(round_to) for space in self.spaces if space.width == index))
            for index in range(len(self.widths))
        )

"""A classifier seen as stem, stages and head.

Distillation compares stage maps, separation narrows stages, fusion folds heads: all three need this view of a network
and nothing else of it. Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from rkd_deploy.errors import UsageError

Widths = tuple[int, ...]
"""Channel counts of what may be narrowed in one network, from the stem on (`Staged.widths`)."""


class FeatureNetwork(nn.Module, ABC):
    """A network that shows its stage maps.

    Attributes:
        fc: The classifier on the pooled last map, [N, C] to [N, K]: logits = fc(GAP(last map)). None for a bare feature
            extractor, and for a classifier whose logits are no function of its pooled last map.
    """

    if TYPE_CHECKING:
        # Not a property when run: most families have a layer of this name. The others keep the name that the public
        # checkpoints give the layer, and make `fc` a property that leads to it.
        @property
        def fc(self) -> nn.Module | None: ...  # noqa: D102

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the last stage map."""

    @abstractmethod
    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The map after each stage, [N, C_i, H_i, W_i], deepest last. The last one is what the head pools."""

    @abstractmethod
    def without_head(self) -> FeatureNetwork:
        """A feature extractor of the same topology with weights of its own."""

    def maps_and_logits(self, x_NCHW: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Stage maps and logits [N, K] of one pass."""
        maps = self.features(x_NCHW)
        assert self.fc is not None
        return maps, self.fc(pool(maps[-1]))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K], or the pooled last map [N, C] of a network without a head."""
        pooled_NC = pool(self.features(x_NCHW)[-1])
        return pooled_NC if self.fc is None else cast(Tensor, self.fc(pooled_NC))


class Staged(FeatureNetwork):
    """A network that can also be built again at other widths.

    Attributes:
        widths: What may be narrowed, from the stem on: enough numbers to build the network again. Each may shrink on
            its own, and the cost rises with each (by steps of 8, at least). In a plain chain of stages they are the
            channels of the stem and of every stage; where channels are tied to each other they are the free numbers
            behind them, and the family's docstring says which.
        multiple_of: Every width is a multiple of this, e.g. because convolutions are grouped.
        fixed: Why some layers keep their channels at any widths, a reason each; empty where all can be narrowed.
    """

    widths: Widths
    multiple_of: ClassVar[int] = 1
    fixed: tuple[str, ...] = ()

    if TYPE_CHECKING:

        @property
        def fc(self) -> nn.Linear | None: ...  # noqa: D102

    @abstractmethod
    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> Staged:
        """A network of this topology with other widths and fresh weights; no head when `num_classes` is None."""

    def stages(self) -> tuple[nn.Module, ...]:
        """The network cut after every stage map: the first takes images and holds the stem, each gives its map.

        One after the other they are `features`. They share the network's layers; what joins them is made anew.

        Raises:
            UsageError: This network shows its maps but cannot be cut between them.
        """
        raise UsageError(
            f"{type(self).__name__} cannot be cut into stages: it shows its stage maps, and nothing says which of its "
            'layers lie between two of them. Scheme progressive needs that of S0: use method.scheme = "sequential" or '
            '"end_to_end", or one of the built-in families (rkd_deploy.models.zoo.network_names).'
        )

    def widths_before(self, stages: int) -> tuple[int, ...]:
        """Indices of the widths that the first stages depend on, found by building the network at other widths."""
        shapes, indices = _tensor_shapes(self, stages), []
        for index, (width, step) in enumerate(zip(self.widths, self.steps(1), strict=True)):
            with torch.device("meta"):
                other = self.rebuilt((*self.widths[:index], width + step, *self.widths[index + 1 :]), None)
            if _tensor_shapes(other, stages) != shapes:
                indices.append(index)
        return tuple(indices)

    @torch.no_grad()
    def channels_after(self, stages: int) -> int:
        """Channels of the map that the first stages give."""
        shadow = copy.deepcopy(nn.Sequential(*self.stages()[:stages])).to("meta").eval()
        map_NCHW: Tensor = shadow(torch.empty(1, 3, 64, 64, device="meta"))  # channels do not depend on the size
        return map_NCHW.shape[1]

    def steps(self, round_to: int) -> Widths:
        """The step of each width, for channel counts that are multiples of `round_to`."""
        return (math.lcm(round_to, self.multiple_of),) * len(self.widths)

    def without_head(self) -> Staged:
        """A network of these widths without a head, with fresh weights."""
        return self.rebuilt(self.widths, None)

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return self.widths[-1]


def _tensor_shapes(network: Staged, stages: int) -> list[torch.Size]:
    return [value.shape for value in nn.ModuleList(network.stages()[:stages]).state_dict().values()]


def pool(map_NCHW: Tensor) -> Tensor:
    """Global average pooling (GAP): [N, C, H, W] to [N, C]."""
    # Not adaptive_avg_pool2d: the ONNX exporter turns that into a dozen shape computations around one mean.
    return map_NCHW.mean((2, 3))


@torch.no_grad()
def stage_shapes(network: nn.Module, image_size: Sequence[int]) -> list[tuple[int, int, int]]:
    """(C, H, W) of every stage map for images of this height and width, found by running one."""
    was_training, like = network.training, next(network.parameters())
    maps = network.eval().features(like.new_zeros(1, 3, *image_size))  # type: ignore[operator]
    network.train(was_training)
    return [tuple(stage_map.shape[1:]) for stage_map in maps]


def checked_widths(widths: Sequence[int], count: int, meaning: str, multiple_of: int = 1) -> Widths:
    """Refuse widths that no network of a family can be built of; gives them back as a tuple.

    Args:
        widths: The channel counts to check.
        count: How many there must be.
        meaning: What they are the channels of, for the message.
        multiple_of: What each must be a multiple of.

    Raises:
        UsageError: There are more or fewer widths than needed, or one is no positive multiple.
    """
    if len(widths) != count or min(widths) < 1 or any(width % multiple_of for width in widths):
        rule = f", multiples of {multiple_of}" if multiple_of > 1 else ""
        raise UsageError(f"widths = {tuple(widths)} must be {count} positive channel counts{rule}: {meaning}.")
    return tuple(widths)


def he_initialised(network: nn.Module) -> None:
    """Draw fresh convolutions after He et al. 2015: normal, variance 2 / (kernel area x output channels), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put a network into one mode while the block runs; afterwards every module is in its own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

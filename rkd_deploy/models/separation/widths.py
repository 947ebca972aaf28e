"""What a network of given widths costs, and the widest widths that a cost allows.

"Widest" is a search over multiples of r_i, the least common multiple of `round_to` and what width i must be a multiple
of anyway (`Staged.steps`), in two steps: the largest multiplier m whose widths max(r_i, floor(m w_i / r_i) r_i) fit,
then width by width one more step where it still fits, the relatively narrowest first. So no width of the result can
grow any further, and none exceeds S0's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rkd_deploy.models.cost import count, count_head
from rkd_deploy.models.progressive import adapter_cost
from rkd_deploy.models.separation.pruning import Pruned
from rkd_deploy.models.staged import Staged

Widths = tuple[int, ...]


class Prices:
    """Costs in one unit; networks are built without data and each is counted once.

    Args:
        given: S0, or a network of its topology.
        num_classes: K, of the head.
        size: Height and width of the images in pixels.
        unit: ``"macs"`` or ``"params"``.
        channels: C_T, to which the adapters lead.
        head: h, from C_T channels; None: a linear layer.
        stage_channels: C_T of every stage, where S and A exchange their maps at each.
    """

    def __init__(
        self,
        given: Staged,
        num_classes: int,
        size: tuple[int, int],
        unit: str,
        channels: int,
        head: nn.Module | None,
        stage_channels: Sequence[int] | None,
    ) -> None:
        self._given, self._size, self._unit, self._channels = given, size, unit, channels
        self._stage_channels = stage_channels
        self._known: dict[tuple[Widths, int | None], tuple[int, int]] = {}
        self._trunks: dict[tuple[Widths, int], int] = {}
        with torch.no_grad():
            shadow = copy.deepcopy(given).to("meta").eval()
            last = shadow.features(torch.empty(1, 3, *size, device="meta"))[-1]
        self._positions = last.shape[-2] * last.shape[-1]
        self.head = num_classes * channels + (num_classes if unit == "params" else 0)
        if head is not None:
            cost = count_head(head, channels)
            self.head = cost.macs if unit == "macs" else cost.parameters

    def network(self, widths: Widths, num_classes: int | None) -> int:
        """Of a network of these widths, with a linear head or (None) without one."""
        return self._counted(widths, num_classes)[0]

    def trunk(self, widths: Widths, shared_stages: int) -> int:
        """Of the first stages of a network of these widths."""
        key = (widths, shared_stages)
        if key not in self._trunks:
            with torch.device("meta"):
                stages = nn.Sequential(*self._given.rebuilt(widths, None).stages()[:shared_stages])
            cost = count(stages, self._size)
            self._trunks[key] = cost.macs if self._unit == "macs" else cost.parameters
        return self._trunks[key]

    def adapter(self, widths: Widths) -> int:
        """Of P, from a network of these widths to C_T channels; of all its adapters where maps are exchanged."""
        if self._stage_channels is not None:
            with torch.device("meta"), torch.no_grad():
                maps = self._given.rebuilt(widths, None).eval().features(torch.empty(1, 3, *self._size))
            shapes = [(one.shape[1], one.shape[2], one.shape[3]) for one in maps]
            return adapter_cost(shapes, self._stage_channels, self._unit)
        weights = self._counted(widths, None)[1] * self._channels
        return weights * self._positions if self._unit == "macs" else weights + 2 * self._channels  # U, g and beta

    def _counted(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        """The network's cost, and the channels of its last map."""
        key = (widths, num_classes)
        if key not in self._known:
            self._known[key] = self._pruned(*key) if isinstance(self._given, Pruned) else self._built(*key)
        return self._known[key]

    def _built(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        with torch.device("meta"):
            network = self._given.rebuilt(widths, num_classes)
        cost = count(network, self._size)
        return cost.macs if self._unit == "macs" else cost.parameters, network.channels

    def _pruned(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        assert isinstance(self._given, Pruned)
        macs, params = self._given.pruner.cost(widths)
        channels = self._given.channels_at(widths)
        head = 0 if num_classes is None else channels * num_classes
        bias = num_classes or 0
        return macs + head if self._unit == "macs" else params + head + bias, channels


def widest(price: Callable[[Widths], int], full: Widths, limit: int, round_to: int | Widths) -> Widths | None:
    """The widest widths whose price is within the limit (the search of this module's docstring).

    Args:
        price: Cost of a network of these widths; rises with every width.
        full: S0's widths, the upper bound.
        limit: What the price must not exceed.
        round_to: Step of every width, or that of each.

    Returns:
        The widths, or None when even the narrowest are too dear.
    """
    steps = (round_to,) * len(full) if isinstance(round_to, int) else round_to

    def scaled(numerator: int) -> Widths:
        return tuple(
            min(width, max(step, numerator * width // (1024 * step) * step))
            for width, step in zip(full, steps, strict=True)
        )

    if price(scaled(0)) > limit:
        return None
    low, high = 0, 1025  # multipliers in 1/1024: low fits, high does not (or is above 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if price(scaled(middle)) <= limit else (low, middle)
    widths = scaled(low)
    while True:
        before, stages = widths, set(range(len(full)))
        while stages:
            stage = min(stages, key=lambda index: (widths[index] / full[index], index))
            step = min(full[stage], widths[stage] + steps[stage])
            wider = (*widths[:stage], step, *widths[stage + 1 :])
            if step > widths[stage] and price(wider) <= limit:
                widths = wider
            else:
                stages.remove(stage)  # what does not fit now will not fit among wider stages
        if widths == before:  # every stage has been tried beside the final widths of the others
            return widths

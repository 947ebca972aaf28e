"""This process's share of every batch, so that R processes see in a step what one alone would see."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from rkd_deploy.train.loop import Batches
from rkd_deploy.train.parallel import Group


class Share:
    """Every R-th image of each batch of a loader, from this process's own number on.

    Args:
        loader: Draws whole batches, the same on every process.
        group: Its size R divides the batch size.
    """

    def __init__(self, loader: Batches, group: Group) -> None:
        self._loader, self._group = loader, group

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the batches of an epoch."""
        mine = slice(self._group.rank, None, self._group.size)
        for x_NCHW, y_N in self._loader.epoch(number, first_batch):
            yield x_NCHW[mine], y_N[mine]

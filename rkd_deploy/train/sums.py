"""What the log says of an epoch, summed up on the device: reading it would wait for the device at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rkd_deploy.data.mixing import hard_labels
from rkd_deploy.train.methods.base import Losses
from rkd_deploy.train.parallel import Group

_NEVER = 2**62


@dataclass
class EpochSums:
    """Sums over the images of an epoch in progress; of this process's share of them.

    Attributes:
        names: Of the values: the loss, its parts.
        totals_V: Sum over images of each value, float64.
        correct: Images that were classified right; None where nothing is classified yet.
        images: How many were seen.
    """

    names: tuple[str, ...] = ()
    totals_V: Tensor | None = None
    correct: Tensor | None = None
    images: int = 0
    _first_bad_V: Tensor | None = field(default=None, repr=False)

    def add(self, losses: Losses, y_N: Tensor, step: int) -> None:
        """Count one batch in.

        Args:
            losses: Of the batch.
            y_N: Labels [N], or probabilities [N, K].
            step: Its number within the epoch, from 1.
        """
        self.names = ("loss", *losses.parts)
        values_V = torch.stack([value.detach().double() for value in (losses.total, *losses.parts.values())])
        first_bad_V = torch.where(values_V.isfinite(), _NEVER, step)
        weighted_V = values_V * len(y_N)
        self.totals_V = weighted_V if self.totals_V is None else self.totals_V + weighted_V
        if losses.logits_NK is not None:
            correct = (losses.logits_NK.argmax(1) == hard_labels(y_N)).sum()
            self.correct = correct if self.correct is None else self.correct + correct
        self._first_bad_V = first_bad_V if self._first_bad_V is None else self._first_bad_V.minimum(first_bad_V)
        self.images += len(y_N)

    def over(self, group: Group) -> EpochSums:
        """The sums over the images of all processes."""
        if group.size == 1 or self.totals_V is None or self._first_bad_V is None:
            return self
        counts_2 = self.totals_V.new_tensor([self.images, 0 if self.correct is None else self.correct])
        *totals, images, correct = group.summed(torch.cat([self.totals_V, counts_2]))
        right = None if self.correct is None else correct.long()
        return EpochSums(self.names, torch.stack(totals), right, int(images.item()), group.smallest(self._first_bad_V))

    def means(self) -> dict[str, float]:
        """Means over the images so far, and the training accuracy in percent; this waits for the device."""
        if self.totals_V is None:
            return {}
        means = dict(zip(self.names, (self.totals_V / self.images).tolist(), strict=True))
        return means if self.correct is None else {**means, "train_top1": 100 * self.correct.item() / self.images}

    def first_bad(self) -> tuple[int, list[str]] | None:
        """The first step with a value that is not finite and the parts of the loss that are not, or None."""
        if self._first_bad_V is None:
            return None
        steps = self._first_bad_V.tolist()
        if (first := min(steps)) == _NEVER:
            return None
        bad = [name for name, step in zip(self.names, steps, strict=True) if step == first]
        return first, [name for name in bad if name != "loss"] or bad

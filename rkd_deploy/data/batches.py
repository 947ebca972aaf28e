"""Says which images a batch holds, in every process of a run, and draws by what seed.

With N processes each gets its own N-th of the same global batches, in order: N processes with B / N images each see
what one process with B sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rkd_deploy.errors import RecipeError


class Loader(Protocol):
    """A loader as the training loop knows it: what an epoch gives depends on (seed, epoch) alone."""

    def __len__(self) -> int:
        """The number of batches in an epoch."""

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process."""

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch: x [N, C, H, W] float32 and y, int64 [N] or targets float32 [N, K].

        Args:
            number: Number of the epoch; the same one gives the same batches.
            first_batch: Batch to begin with, for a resumed run.
        """


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process of a run takes.

    Attributes:
        rank: Number of the process, from 0.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class EpochBatches:
    """Cuts the order of an epoch into batches.

    Attributes:
        count: Number of images.
        batch_size: B, of all processes together; an epoch drops the images that do not fill a last batch. A set that is
            smaller than B makes one batch.
        share: The part that this process takes.
        partners: Whether a batch begins with one image more, the one before it in the global batch (in front of the
            first: the last), for mixing.
    """

    count: int
    batch_size: int
    share: Share
    partners: bool

    def __post_init__(self) -> None:
        if self.batch_size % self.share.world_size:
            raise RecipeError(
                f"train.batch_size = {self.batch_size} is that of all {self.share.world_size} processes together, and "
                "cannot be divided evenly among them. Take a multiple."
            )
        if self.count < self.share.world_size:
            raise RecipeError(
                f"{self.count} training images cannot be divided among {self.share.world_size} processes. Add images, "
                "or start fewer processes."
            )

    def __len__(self) -> int:
        return self.count // self._whole

    @property
    def _whole(self) -> int:
        return min(self.batch_size, self.count - self.count % self.share.world_size)

    @property
    def size(self) -> int:
        """Images in a batch of this process, without partners."""
        return self._whole // self.share.world_size

    def positions(self, batch: int) -> Tensor:
        """Positions of a batch's images in the order of the epoch, int64 [N], or [1 + N] with partners."""
        first = self.share.rank * self.size
        # The remainder: before the first image of the whole batch comes its last, which is the first one's partner.
        within_N = torch.arange(first - self.partners, first + self.size) % self._whole
        return batch * self._whole + within_N


def generator_of_epoch(seed: int, epoch: int) -> torch.Generator:
    """A generator for the random numbers of one epoch."""
    # A prime far above any number of epochs: no two seeds share an epoch's numbers.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def generator_of_batch(seed: int, epoch: int, batch: int) -> np.random.Generator:
    """A generator for the random numbers of one batch, whatever was drawn before it."""
    return np.random.default_rng((seed, epoch, batch))


@contextmanager
def seeded_image(seed: int, epoch: int, image: int) -> Iterator[None]:
    """Seed PyTorch on the CPU, while the block runs, for one image of one epoch, in whatever process that is."""
    state = torch.get_rng_state()
    words = np.random.SeedSequence((seed, epoch, image)).generate_state(2)
    torch.default_generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)  # 63 bits: a seed has a sign
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Normaliser:
    """Turns uint8 images into a network's input: (x / 255 - mean) / std, float32.

    Args:
        mean: Mean per channel, in units of [0, 1].
        std: Standard deviation per channel, in units of [0, 1].
        device: Where the result is; images from elsewhere are moved there as uint8.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.device = device
        # Worked out in float64 and rounded once: exported graphs have the same two constants (`export/graph.py`), so
        # that training and app see the same numbers.
        self._scale = (1 / (255 * std_C)).float().view(-1, 1, 1).to(device)
        self._shift = (-mean_C / std_C).float().view(-1, 1, 1).to(device)

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Normalise images, uint8 [N, C, H, W], to float32 on the device."""
        return torch.addcmul(self._shift, images_NCHW.to(self.device, non_blocking=True), self._scale)

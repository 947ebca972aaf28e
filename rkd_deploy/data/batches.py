"""Which images a batch is made of, for every process of a run, and the random numbers that belong to them.

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
    """What the training loop knows of a loader. What an epoch gives depends on (seed, epoch) alone."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process."""

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch: x [N, C, H, W] float32 and y, int64 [N] or targets float32 [N, K].

        Args:
            number: Which epoch; the same number gives the same batches.
            first_batch: Where to begin, for a resumed run.
        """


@dataclass(frozen=True)
class Share:
    """Which of a run's processes this is.

    Attributes:
        rank: From 0.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Batching:
    """Cuts the order of an epoch into batches.

    Args:
        count: Images.
        batch_size: B, of all processes together; an epoch drops the images that do not fill a last batch.
        share: This process.
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

    def __len__(self) -> int:
        return self.count // self._whole

    @property
    def _whole(self) -> int:
        return min(self.batch_size, self.count - self.count % self.share.world_size)

    @property
    def size(self) -> int:
        """Images in a batch of this process, without partners."""
        return self._whole // self.share.world_size

    def places(self, batch: int) -> Tensor:
        """Places of a batch's images in the order of the epoch, int64 [N], or [1 + N] with partners."""
        first = self.share.rank * self.size
        within_N = torch.arange(first - self.partners, first + self.size) % self._whole
        return batch * self._whole + within_N


def generator_of_epoch(seed: int, epoch: int) -> torch.Generator:
    """Random numbers of one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def generator_of_batch(seed: int, epoch: int, batch: int) -> np.random.Generator:
    """Random numbers of one batch, whatever was drawn before it."""
    return np.random.default_rng((seed, epoch, batch))


@contextmanager
def seeded_image(seed: int, epoch: int, image: int) -> Iterator[None]:
    """Inside, what PyTorch draws on the CPU belongs to one image of one epoch, whoever reads it; restored after."""
    state = torch.get_rng_state()
    words = np.random.SeedSequence((seed, epoch, image)).generate_state(2)
    torch.default_generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Normaliser:
    """uint8 images to the network's input: (x / 255 - mean) / std, float32.

    Args:
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        device: Where the result is; images from elsewhere are moved there as uint8.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.device = device
        self._scale = (1 / (255 * std_C)).float().view(-1, 1, 1).to(device)
        self._shift = (-mean_C / std_C).float().view(-1, 1, 1).to(device)

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] uint8 to float32."""
        return torch.addcmul(self._shift, images_NCHW.to(self.device, non_blocking=True), self._scale)

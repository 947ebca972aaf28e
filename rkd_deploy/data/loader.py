"""A loader for sets that fit in the device's memory: no workers, no copies, a whole batch augmented at once.

What epoch e gives depends only on (seed, e): a run can be resumed at any batch and sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkd_deploy.data import augment
from rkd_deploy.data.sources import Split


class Normaliser:
    """uint8 images to the network's input: (x / 255 - mean) / std, float32.

    Args:
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        device: Where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * std_C)).float().view(-1, 1, 1).to(device)
        self._shift = (-mean_C / std_C).float().view(-1, 1, 1).to(device)

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] uint8 to float32."""
        return torch.addcmul(self._shift, images_NCHW, self._scale)


class DeviceLoader:
    """Shuffled, augmented, normalised batches of images that are on the device already.

    Args:
        split: The images; moved nowhere.
        normalise: uint8 batch to float batch.
        batch_size: N; an epoch drops the images that do not fill a last batch.
        augmentations: Any of ``"crop"`` and ``"flip"``.
        crop_padding: Pixels of zeros on each side, for crop.
        seed: Together with the number of an epoch decides everything random in it.
    """

    def __init__(
        self,
        split: Split,
        normalise: Normaliser,
        *,
        batch_size: int,
        augmentations: Sequence[str],
        crop_padding: int,
        seed: int,
    ) -> None:
        self._labels_N = split.labels_N
        self._normalise = normalise
        self._batch_size = min(batch_size, len(split))
        self._flip = "flip" in augmentations
        self._padding = crop_padding if "crop" in augmentations else 0
        height, width = split.images_NCHW.shape[-2:]
        self._size = (height, width)
        self._images_NCHW = augment.pad(split.images_NCHW, self._padding) if self._padding else split.images_NCHW
        self._seed = seed

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._labels_N) // self._batch_size

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return self._batch_size

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x [N, C, H, W] float32, y [N] int64) of one epoch.

        Args:
            number: Which epoch; the same number gives the same batches.
            first_batch: Where to begin, for a resumed run.
        """
        count = len(self._labels_N)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        order_N = torch.randperm(count, generator=generator)
        offsets_2N = torch.randint(0, 2 * self._padding + 1, (2, count), generator=generator)
        flips_N = torch.rand(count, generator=generator) < 0.5
        device = self._labels_N.device
        order_N, offsets_2N, flips_N = order_N.to(device), offsets_2N.to(device), flips_N.to(device)
        for batch in range(first_batch, len(self)):
            chosen = slice(batch * self._batch_size, (batch + 1) * self._batch_size)
            index_N = order_N[chosen]
            if self._padding:
                top_N, left_N = offsets_2N[:, chosen]
                images_NCHW = augment.crop(self._images_NCHW, index_N, top_N, left_N, self._size)
            else:
                images_NCHW = self._images_NCHW[index_N]
            if self._flip:
                images_NCHW = augment.flip(images_NCHW, flips_N[chosen])
            yield self._normalise(images_NCHW), self._labels_N[index_N]

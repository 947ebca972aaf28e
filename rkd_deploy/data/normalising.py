"""From pixels to the numbers that networks are fed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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

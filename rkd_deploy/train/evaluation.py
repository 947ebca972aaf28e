"""Accuracy of a network in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.sources import AnySplit

BATCH, _PIXELS = 500, 2**22


def batch_of(image_size: tuple[int, int]) -> int:
    """Images that are evaluated at once: 500, and fewer of those above 91 pixels (83 of 224), for the memory's sake."""
    height, width = image_size
    return max(1, min(BATCH, _PIXELS // (height * width)))


@torch.inference_mode()
def predictions(module: nn.Module, split: AnySplit, normalise: Normaliser) -> Tensor:
    """The most likely class of every image, [N] int64 on the CPU; the module is left in the mode it was in."""
    was_training = module.training
    module.eval()
    batches = [
        module(normalise(images_NCHW)).argmax(1).cpu() for images_NCHW in split.chunks(batch_of(split.image_size))
    ]
    module.train(was_training)
    return torch.cat(batches)

"""Accuracy of a network in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.sources import Split

BATCH = 500


@torch.inference_mode()
def predictions(module: nn.Module, split: Split, normalise: Normaliser) -> Tensor:
    """The most likely class of every image, [N] int64 on the CPU; the module is left in the mode it was in."""
    was_training = module.training
    module.eval()
    batches = [module(normalise(images_NCHW)).argmax(1).cpu() for images_NCHW in torch.split(split.images_NCHW, BATCH)]
    module.train(was_training)
    return torch.cat(batches)

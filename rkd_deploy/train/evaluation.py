"""Accuracy of a network in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.splits import AnySplit, evaluation_batch
from rkd_deploy.models.logits import check_logits


@torch.inference_mode()
def predictions(
    module: nn.Module,
    split: AnySplit,
    normalise: Normaliser,
    step: Callable[[], None] | None = None,
    name: str | None = None,
) -> Tensor:
    """The most likely class of every image, [N] int64 on the CPU; the module is left in the mode it was in.

    Args:
        module: Images to logits.
        split: The images.
        normalise: uint8 to the network's input.
        step: Called after each batch, to show progress.
        name: What messages call the network. Default: its class.

    Raises:
        DivergenceError: Its logits are not finite: every class would be as likely, and the first one be counted.
        UsageError: It gives probabilities in place of logits.
    """
    was_training = module.training
    module.eval()
    found = []
    for images_NCHW in split.chunks(evaluation_batch(split.image_size)):
        logits_NK = module(normalise(images_NCHW))
        check_logits(logits_NK, name or f"the network {type(module).__name__}")
        found.append(logits_NK.argmax(1).cpu())
        if step is not None:
            step()
    module.train(was_training)
    return torch.cat(found)


def batches(split: AnySplit) -> int:
    """How many batches `predictions` makes of these images."""
    return math.ceil(len(split) / evaluation_batch(split.image_size))

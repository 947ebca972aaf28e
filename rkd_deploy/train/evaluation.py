"""What a PyTorch network answers on a split, and which images those were."""

from __future__ import annotations

import hashlib
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
    step: Callable[[Tensor], object] | None = None,
    name: str | None = None,
) -> Tensor:
    """The most likely class of every image, [N] int64 on the CPU; the module is left in the mode it was in.

    Args:
        module: Images to logits.
        split: The images.
        normalise: uint8 to the network's input.
        step: Called with the images of each batch, uint8 [n, 3, H, W], once it is done.
        name: What messages call the network. Default: its class.

    Raises:
        DivergenceError: The logits are not finite: every class would be as likely, and the first one be counted.
        UsageError: It gives probabilities in place of logits.
    """
    was_training = module.training
    module.eval()
    classes = []
    for images_NCHW in split.chunks(evaluation_batch(split.image_size)):
        logits_NK = module(normalise(images_NCHW))
        check_logits(logits_NK, name or f"the network {type(module).__name__}")
        classes.append(logits_NK.argmax(1).cpu())
        if step is not None:
            step(images_NCHW)
    module.train(was_training)
    return torch.cat(classes)


class SplitHash:
    """SHA-256 of a split as a network is judged on it: height and width, decoded pixels in order, labels.

    Args:
        image_size: Height and width in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._sum = hashlib.sha256(str(tuple(image_size)).encode())

    def add(self, images_NCHW: Tensor) -> None:
        """Hash the next images, uint8 [n, 3, H, W]; how many at once makes no difference."""
        self._sum.update(images_NCHW.cpu().contiguous().numpy().data)

    def finish(self, labels_N: Tensor) -> str:
        """The hash in hexadecimal, with the labels of all images, int64 [N]."""
        self._sum.update(labels_N.cpu().contiguous().numpy().data)
        return self._sum.hexdigest()


def batches(split: AnySplit) -> int:
    """How many batches `predictions` makes of these images."""
    return math.ceil(len(split) / evaluation_batch(split.image_size))

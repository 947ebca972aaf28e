"""Every network that can be made by its name: the CIFAR families that distillation is compared on."""

from __future__ import annotations

from collections.abc import Callable

from rkd_deploy.errors import UsageError, unknown_name
from rkd_deploy.models import cifar, mobilenet, resnet50, shufflenet, vgg, wide_resnet
from rkd_deploy.models.staged import Staged

_MAKERS: dict[str, Callable[[int], Staged]] = {
    **cifar.FAMILY,
    **wide_resnet.FAMILY,
    **vgg.FAMILY,
    **mobilenet.FAMILY,
    **shufflenet.FAMILY,
    **resnet50.FAMILY,
}


def names() -> tuple[str, ...]:
    """Every network that `create` knows."""
    return tuple(_MAKERS)


def create(name: str, num_classes: int) -> Staged:
    """Build a network with fresh weights.

    Args:
        name: One of `names()`, e.g. ``"resnet20"``.
        num_classes: K, the number of logits.

    Raises:
        UsageError: Unknown name.
    """
    if name not in _MAKERS:
        raise UsageError(unknown_name("network", name, _MAKERS))
    return _MAKERS[name](num_classes)

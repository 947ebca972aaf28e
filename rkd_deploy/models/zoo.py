"""Every network that can be made by its name.

The CIFAR families that distillation is compared on are written here (``resnet20``). Any other classifier is made by
whoever wrote it and seen through `External`: ``tv:NAME``, ``timm:NAME``, ``package.module:attribute`` (`catalogues`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rkd_deploy.errors import UsageError, unknown_name
from rkd_deploy.models import catalogues, cifar, mobilenet, resnet50, shufflenet, vgg, wide_resnet
from rkd_deploy.models.external import External
from rkd_deploy.models.staged import FeatureNetwork, Staged

_MAKERS: dict[str, Callable[[int], Staged]] = {
    **cifar.FAMILY,
    **wide_resnet.FAMILY,
    **vgg.FAMILY,
    **mobilenet.FAMILY,
    **shufflenet.FAMILY,
    **resnet50.FAMILY,
}


def names() -> tuple[str, ...]:
    """Every network of the families written here."""
    return tuple(_MAKERS)


def create(
    name: str, num_classes: int, *, input_size: int | Sequence[int] = 224, stages: Sequence[str] | None = None
) -> FeatureNetwork:
    """Build a network with fresh weights, or take a user's own as it is.

    Args:
        name: One of `names()`, e.g. ``"resnet20"``, which give a `Staged`; or the name of an external one.
        num_classes: K, the number of logits.
        input_size: Height and width in pixels, or one number for both. External networks are run once to be understood.
        stages: Where the stages of an external network end (`External`). Default: found.

    Raises:
        UsageError: Unknown name; an external network that gives another number of logits; stages of a family.
        MissingDependencyError: timm is not installed.
    """
    if not catalogues.is_external(name):
        if name not in _MAKERS:
            outside = "Other classifiers: tv:NAME (torchvision), timm:NAME, package.module:attribute (your own)."
            raise UsageError(f"{unknown_name('network', name, _MAKERS)} {outside}")
        if stages:
            raise UsageError(f"stages = {list(stages)} has no effect: those of {name} are given. Leave it out.")
        return _MAKERS[name](num_classes)
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    network = External(catalogues.build(name, num_classes, (height, width)), stages, input_size=(height, width))
    if network.num_classes != num_classes:
        raise UsageError(
            f"{name} gives {network.num_classes} logits; the data have {num_classes} classes. Give it a parameter "
            "num_classes, or name a network made for these classes."
        )
    return network

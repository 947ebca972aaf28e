"""Training methods, one paper a page: the loss as a pure function, the class under it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rkd_deploy.models.staged import FeatureNetwork, stage_shapes
from rkd_deploy.recipe import MethodRecipe
from rkd_deploy.train.methods.attention import AttentionTransfer
from rkd_deploy.train.methods.base import BaseLoss, WeightedLoss
from rkd_deploy.train.methods.dkd import DKD
from rkd_deploy.train.methods.fitnet import FitNet
from rkd_deploy.train.methods.kd import KD
from rkd_deploy.train.methods.reviewkd import ReviewKD
from rkd_deploy.train.methods.simkd import ReusedClassifier, SimKD

PUBLISHED_EPOCHS = 240
"""Epochs of the CIFAR-100 protocol (RepDistiller, mdistiller) that published warm-ups belong to."""


def base_loss(
    recipe: MethodRecipe,
    teacher: FeatureNetwork,
    network: nn.Module,
    image_size: Sequence[int],
    epochs: int = PUBLISHED_EPOCHS,
) -> WeightedLoss:
    """The borrowed loss of a recipe, with fresh adapters between these two networks, on the network's device.

    Args:
        recipe: Table `[method]`; its `loss` is not ``"none"``.
        teacher: T.
        network: Network that is taught: S, S0, or S0 with a reused head.
        image_size: Height and width in pixels.
        epochs: Epochs of the phase: a published warm-up keeps its share of them.
    """
    shapes = (stage_shapes(teacher, image_size), stage_shapes(network, image_size))
    loss: BaseLoss
    match recipe.loss:
        case "kd":
            loss = KD(recipe.temperature, recipe.standardise)
        case "dkd":
            loss = DKD(recipe.dkd_alpha, recipe.dkd_beta, recipe.temperature, recipe.standardise)
        case "at":
            loss = AttentionTransfer()
        case "fitnet":
            loss = FitNet(*shapes, recipe.hint_stage)
        case "reviewkd":
            loss = ReviewKD(*shapes)
        case "simkd":
            loss = SimKD(*shapes, None if isinstance(network, ReusedClassifier) else recipe.simkd_factor)
        case other:
            raise AssertionError(other)  # recipes know no other name
    device = next(network.parameters()).device
    warmup = recipe.base_warmup_epochs
    if warmup is None:  # else a short run would end before its loss has begun
        warmup = round(loss.warmup_epochs * epochs / PUBLISHED_EPOCHS)
    return WeightedLoss(loss, recipe.base_weight, warmup).to(device)

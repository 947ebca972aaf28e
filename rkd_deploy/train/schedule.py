"""The learning rate as a function of the step, and the parameter groups it is applied to."""

from __future__ import annotations

import math

import torch
from torch import nn

from rkd_deploy.recipe import TrainRecipe


def learning_rate(recipe: TrainRecipe, step: int, epochs: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step.

    Args:
        recipe: Table `[train]`.
        step: From 0, over all epochs of the phase.
        epochs: Of the phase.
        steps_per_epoch: Batches in an epoch.
    """
    epoch = step / steps_per_epoch
    warmup = min(1.0, (step + 1) / (recipe.warmup_epochs * steps_per_epoch)) if recipe.warmup_epochs else 1.0
    if recipe.schedule == "step":
        return warmup * recipe.lr * recipe.lr_decay ** sum(epoch >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "cosine":
        return warmup * recipe.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return warmup * recipe.lr


def sgd(module: nn.Module, recipe: TrainRecipe) -> torch.optim.SGD:
    """SGD over what the module trains; weight decay only on weights of two dimensions and more."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,  # one kernel for all parameters: small networks are bound by launches otherwise
    )

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.stepping import learning_rate, sgd


def rates(epochs: int, steps: int, **how: Any) -> list[float]:
    recipe = TrainRecipe(**{"lr": 0.8, **how})
    return [learning_rate(recipe, step, epochs, steps) for step in range(epochs * steps)]


def test_cosine_falls_from_the_peak_towards_zero_over_half_a_period() -> None:
    curve = rates(4, 2, schedule="cosine")
    root = math.sqrt(0.5)
    wanted = [1, math.cos(math.pi / 8), root, math.sin(math.pi / 8), 0]
    wanted += [-value for value in wanted[-2:0:-1]]
    assert curve == pytest.approx([0.4 * (1 + value) for value in wanted], abs=1e-12)
    assert curve[0] == 0.8
    assert curve[4] == pytest.approx(0.4)  # half way


def test_step_decays_at_each_milestone_from_its_first_step_on() -> None:
    curve = rates(6, 2, schedule="step", milestones=(2, 5), lr_decay=0.1)
    assert curve == pytest.approx([0.8] * 4 + [0.08] * 6 + [0.008] * 2)


def test_step_before_its_first_milestone_and_constant_stay_at_the_peak() -> None:
    assert rates(3, 2, schedule="step", milestones=(3,)) == [0.8] * 6
    assert rates(3, 2, schedule="constant") == [0.8] * 6


def test_warmup_rises_linearly_and_is_over_after_its_epochs() -> None:
    curve = rates(3, 4, schedule="constant", warmup_epochs=1.5)
    assert curve == pytest.approx([0.8 * k / 6 for k in range(1, 7)] + [0.8] * 6)


def test_warmup_multiplies_the_other_schedules() -> None:
    for how in ({"schedule": "cosine"}, {"schedule": "step", "milestones": (1,)}):
        plain, warm = rates(3, 4, **how), rates(3, 4, **how, warmup_epochs=2)
        factors = [min(1, k / 8) for k in range(1, 13)]
        assert warm == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)])


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    """One step of SGD without gradient moves what decays by lr * decay, and nothing else."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    sgd(module, TrainRecipe(lr=0.5, weight_decay=0.25, momentum=0.0)).step()
    after = {name: parameter.unique().tolist() for name, parameter in module.named_parameters()}
    assert after == {
        "0.weight": [0.875],
        "0.bias": [1],
        "1.weight": [1],
        "1.bias": [1],
        "3.weight": [0.875],
        "3.bias": [1],
    }


@pytest.mark.parametrize(("nesterov", "second"), [(False, 1 + 1.5), (True, 1.5 + 1.75)])
def test_momentum_is_that_of_sgd(nesterov: bool, second: float) -> None:
    """Two steps with gradient 1, lr 1 and momentum 1/2: v = 1, then 1.5; Nesterov steps by g + v / 2."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = sgd(layer, TrainRecipe(lr=1.0, momentum=0.5, nesterov=nesterov, weight_decay=0.0))
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert layer.weight.item() == -second


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    trained = [parameter for group in sgd(module, TrainRecipe()).param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in module[1].parameters()}

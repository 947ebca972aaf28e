"""Scheme progressive: each step's loss a second time, what it moves and leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.progressive import ProgressiveStudent, progressive_student
from rkd_deploy.train.methods.attention import AttentionTransfer, attention_loss
from rkd_deploy.train.methods.base import WeightedLoss
from rkd_deploy.train.methods.kd import KD, kd_loss
from rkd_deploy.train.methods.progressive import ProgressiveStep
from rkd_deploy.train.methods.residual import HeadStep, mse

CHANNELS, CLASSES, WEIGHT = (6, 8, 10), 4, 3.0
EVERY = [(stage, branch) for stage in (1, 2, 3) for branch in (0, 1, 2)]


def used(module: Any) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


@pytest.fixture
def T() -> CifarResNet:
    """A teacher in float64 whose batch norms have seen something."""
    return used(CifarResNet(8, (6, *CHANNELS), CLASSES).double())


@pytest.fixture
def model() -> ProgressiveStudent:
    """S and two assistants in float64, as if they had learnt something already."""
    branches = [CifarResNet(8, widths, None) for widths in ((4, 4, 6, 8), (2, 3, 4, 5), (2, 2, 3, 4))]
    student = progressive_student(branches[0], branches[1:], CHANNELS, CLASSES, (8, 8)).double()
    for row in student.rows():
        for step in row:
            nn.init.normal_(step.adapter.weight, std=0.3)
    return used(student)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Six images and labels."""
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def step_of(T: CifarResNet, model: ProgressiveStudent, stage: int, branch: int, **more: Any) -> ProgressiveStep:
    return ProgressiveStep(T, model, WEIGHT, stage=stage, branch=branch, distance=mse, **more).train()


def parts_by_hand(model: ProgressiveStudent, x: Tensor, stage: int, branch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum before the branch, its adapted map and its map, on a copy: finished steps in eval mode, its own not."""
    rows, s = copy.deepcopy(model).eval().rows(), x
    for row in rows[: stage - 1]:
        s = torch.stack([step(s) for step in row]).sum(0)
    row = rows[stage - 1]
    f = row[branch].train().map(s)
    before = [step(s) for step in row[:branch]]
    return torch.stack(before).sum(0) if before else torch.zeros(()), row[branch].adapter(f), f


@pytest.mark.parametrize(("stage", "branch"), EVERY)
def test_the_loss_of_every_step(
    T: CifarResNet, model: ProgressiveStudent, batch: tuple[Tensor, Tensor], stage: int, branch: int
) -> None:
    (x, y), step = batch, step_of(T, model, stage, branch)
    f_T = copy.deepcopy(T).eval().features(x)[stage - 1]
    before, m, _ = parts_by_hand(model, x, stage, branch)
    error = (f_T - before - m).pow(2).sum() / f_T.numel()
    losses = step(x, y)
    torch.testing.assert_close(losses.total, WEIGHT * error, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["explained"], (1 - error / f_T.pow(2).mean()).detach())
    assert set(losses.parts) == {"assistant" if branch else "student", "explained"}
    if stage < 3:
        assert losses.logits_NK is None
        assert step.deployable() is None
    else:
        logits = model.head((before + m).mean((2, 3))).detach()
        torch.testing.assert_close(losses.logits_NK, logits)


@pytest.mark.parametrize(("stage", "branch"), EVERY)
def test_a_step_moves_only_its_stage_of_its_branch(
    T: CifarResNet, model: ProgressiveStudent, batch: tuple[Tensor, Tensor], stage: int, branch: int
) -> None:
    """Layers, P, Q and the running statistics of batch norm; everything else stands still."""
    step = step_of(T, model, stage, branch)
    before = {key: value.clone() for key, value in step.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step(*batch).total.backward()
    optimizer.step()
    moved = {key for key, value in step.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith(f"model.steps.{stage - 1}.{branch}.")}
    assert (f"model.steps.{stage - 1}.{branch}.back.weight" in moved) is (stage > 1)


def test_steps_thaw_what_the_ones_before_froze_and_the_head_stands_alone(
    T: CifarResNet, model: ProgressiveStudent, batch: tuple[Tensor, Tensor]
) -> None:
    for stage, branch in EVERY:
        step = step_of(T, model, stage, branch)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning == {n for n, _ in model.named_parameters() if n.startswith(f"steps.{stage - 1}.{branch}.")}
        assert not any(m.training for m in T.modules())
        assert step.model.rows()[stage - 1][branch].training
    head = HeadStep(model).train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert not any(layer.training for row in model.rows() for step in row for layer in step.modules())
    assert head(*batch).total.isfinite()


def test_attention_is_taken_stage_by_stage_and_kd_with_the_last(
    T: CifarResNet, model: ProgressiveStudent, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    copied = copy.deepcopy(T).eval()
    for stage in (1, 2, 3):
        _, m, f = parts_by_hand(model, x, stage, 0)
        f_T = copied.features(x)[stage - 1]
        plain = WEIGHT * (f_T - m).pow(2).mean()
        at = step_of(T, model, stage, 0, base=WeightedLoss(AttentionTransfer(), 7.0))(x, y)
        torch.testing.assert_close(at.total, plain + 7 * attention_loss([f_T], [f]), rtol=1e-10, atol=0)
        kd = step_of(T, model, stage, 0, base=WeightedLoss(KD(4.0, False), 2.0))
        wanted = plain if stage < 3 else plain + 2 * kd_loss(copied(x), model.head(m.mean((2, 3))), 4.0)
        torch.testing.assert_close(kd(x, y).total, wanted, rtol=1e-10, atol=0)
        assert (kd.auxiliary() is None) is (stage < 3)
    assert step_of(T, model, 3, 1, base=WeightedLoss(KD(4.0, False))).base is None  # A learns what is left, no more

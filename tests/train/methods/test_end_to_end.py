"""The end-to-end loss and the chain against their formulas in float64; who learns what."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.recipe import MethodRecipe
from rkd_deploy.train.methods import base_loss
from rkd_deploy.train.methods.base import WeightedLoss
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.residual import DISTANCES, AssistantStep, StudentStep, mse, relative
from tests.support.adapters import adapted, learnt

CHANNELS, CLASSES = 8, 4
WEIGHTS = Weights(feature=3.0, assistant=0.7, ce=0.4, student=0.3, step_decay=0.5)
Batch = tuple[Tensor, Tensor]


def used(module: Any) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.double()


@pytest.fixture
def T() -> CifarResNet:
    return used(CifarResNet(8, (4, 4, 6, CHANNELS), CLASSES))


def chain(k: int) -> ResidualStudent:
    """S and k assistants that have learnt something already."""
    assistants = [CifarResNet(8, (2, 3, 4, 5), None) for _ in range(k)]
    student = ResidualStudent(CifarResNet(8, (4, 4, 6, 8), None), assistants, CHANNELS, CLASSES)
    for adapter in student.assistant_adapters:
        learnt(adapter, std=0.3)
    return used(student)


@pytest.fixture
def batch() -> Batch:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def maps_of(model: ResidualStudent, x: Tensor, *, training: bool) -> list[Tensor]:
    """P_S f_S, P_1 f_1, .. by matrices, of a copy."""
    maps = []
    for branch, adapter in model.branches():
        f = copy.deepcopy(branch).train(training).features(x)[-1]
        maps.append(adapted(adapter, f, training=training))
    return maps


def end_to_end(T: CifarResNet, model: ResidualStudent, **how: Any) -> EndToEnd:
    distance = how.pop("distance", mse)
    method = EndToEnd(T, model, distance, WEIGHTS, **{"detach": True, "train_head": False, **how})
    method.train()
    return method


def cross_entropy_by_hand(z: Tensor, y: Tensor) -> Tensor:
    return (z.exp().sum(1).log() - z[torch.arange(len(y)), y]).mean()


def kd_by_hand(z_T: Tensor, z: Tensor) -> Tensor:
    p_T, p = (z_T / 4).softmax(1), (z / 4).softmax(1)
    return 16 * (p_T * (p_T / p).log()).sum(1).mean()


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("D", ["relative", "mse"])
def test_the_loss_is_the_formula(T: CifarResNet, batch: Batch, k: int, detach: bool, D: str) -> None:
    """k = 0 is the control: S0, same losses."""
    model, (x, y) = chain(k), batch
    f_T = copy.deepcopy(T).eval().features(x)[-1]
    maps = maps_of(model, x, training=True)
    unit = f_T.pow(2).mean() if D == "relative" else 1
    wanted = 3.0 * (f_T - maps[0]).pow(2).mean() / unit
    for i in range(1, k + 1):
        r = f_T - sum(maps[:i])
        wanted = wanted + 0.7 * 3.0 / k * 0.5 ** (i - 1) * (r - maps[i]).pow(2).mean() / unit
    z_S, z = (model.head(m.mean((2, 3))) for m in (maps[0], sum(maps)))
    z_T = T.fc(f_T.mean((2, 3)))
    for v, logits in ((1.0, z), (0.3 if k else 0.0, z_S)):
        wanted = wanted + v * (0.4 * cross_entropy_by_hand(logits, y) + 2.5 * kd_by_hand(z_T, logits))
    base = base_loss(MethodRecipe(base="kd", base_weight=2.5), T, model.student, (8, 8)).double()
    losses = end_to_end(T, model, detach=detach, base=base, distance=DISTANCES[D])(x, y)
    torch.testing.assert_close(losses.total, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.logits_NK, z.detach(), rtol=1e-10, atol=1e-12)
    explained = 1 - (f_T - sum(maps)).pow(2).mean() / f_T.pow(2).mean()
    torch.testing.assert_close(losses.parts["explained"], explained.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.parts["base"], kd_by_hand(z_T, z).detach(), rtol=1e-10, atol=0)
    assert ("base_student" in losses.parts) is (k > 0)


def gradients(model: ResidualStudent, method: EndToEnd, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    method(*batch).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_with_the_stop_gradient_s_learns_from_its_own_distance_alone(T: CifarResNet, batch: Batch) -> None:
    model = chain(2)
    silent = dataclasses.replace(WEIGHTS, ce=0.0, student=0.0)
    alone = StudentStep(T, model, 3.0).train()
    alone(*batch).total.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".")[0] for n in wanted} == {"student", "student_adapter"}
    for detach in (True, False):
        method = EndToEnd(T, model, relative, silent, detach=detach, train_head=False).train()
        computed = gradients(model, method, batch)
        same = all(torch.allclose(computed[n], wanted[n], rtol=1e-9, atol=1e-12) for n in wanted)
        assert same is detach


def test_without_it_one_assistant_pulls_at_s_as_the_distance_of_the_sum_does(T: CifarResNet, batch: Batch) -> None:
    """For D = mse: D(f_T - s, P f_A) = D(f_T, s + P f_A), in value and gradient."""
    model, (x, _) = chain(1), batch
    only = Weights(feature=1.0, assistant=1.0, ce=0.0, student=0.0, step_decay=0.5)
    computed = gradients(model, EndToEnd(T, model, mse, only, detach=False, train_head=False).train(), batch)
    model.zero_grad(set_to_none=True)
    model.train()
    with torch.no_grad():
        f_T = T.features(x)[-1]
    s = model.student_map(x)
    ((f_T - s).pow(2).mean() + (f_T - s - model.assistant_map(x)).pow(2).mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(computed[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("base", ["none", "kd", "reviewkd"])
def test_gradients_reach_everything_but_t_and_its_head(
    T: CifarResNet, batch: Batch, train_head: bool, base: str
) -> None:
    model = chain(2)
    loss: WeightedLoss | None = None
    if base != "none":
        loss = base_loss(MethodRecipe(base=base), T, model.student, (8, 8)).double()
    method = end_to_end(T, model, train_head=train_head, base=loss)
    computed = gradients(model, method, batch)
    wanted = {n for n, _ in model.named_parameters() if train_head or not n.startswith("head.")}
    assert {n for n, gradient in computed.items() if gradient.any()} == wanted
    assert not any(p.requires_grad or p.grad is not None for p in T.parameters())
    assert all(p.grad is not None for p in method.base.parameters()) if method.base else True
    assert not T.training
    assert model.student.training
    assert method.deployable() is model


def test_a_base_loss_is_added_to_s_with_its_weight_in_the_sequential_scheme(T: CifarResNet, batch: Batch) -> None:
    model, (x, y) = chain(1), batch
    loss = base_loss(MethodRecipe(base="kd", base_weight=2.5), T, model.student, (8, 8)).double()
    f_T, f_S = T.eval().features(x)[-1], maps_of(model, x, training=True)[0]
    added = 2.5 * kd_by_hand(T.fc(f_T.mean((2, 3))), model.head(f_S.mean((2, 3))))
    step = StudentStep(T, model, 3.0, distance=mse, base=loss).train()
    torch.testing.assert_close(step(x, y).total, 3.0 * (f_T - f_S).pow(2).mean() + added, rtol=1e-9, atol=0)


def test_a_published_warm_up_keeps_its_share_of_the_epochs(T: CifarResNet) -> None:
    """20 of 240 as published, 1 of 12, none of 4; what the recipe says stands."""
    dkd = MethodRecipe(base="dkd")
    warmups = [base_loss(dkd, T, T, (8, 8), epochs).warmup_epochs for epochs in (240, 12, 4)]
    assert warmups == [20, 1, 0]
    assert base_loss(MethodRecipe(base="dkd", base_warmup_epochs=7), T, T, (8, 8), 4).warmup_epochs == 7


# The chain in the sequential scheme


@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_assistant_learns_what_the_sum_before_it_leaves_over(T: CifarResNet, batch: Batch, number: int) -> None:
    model, (x, y) = chain(3), batch
    maps = maps_of(model, x, training=False)
    assistants_map = maps_of(model, x, training=True)[number]
    f_T = copy.deepcopy(T).eval().features(x)[-1]
    step = AssistantStep(T, model, 2.0, distance=mse, number=number).train()
    losses = step(x, y)
    r = f_T - sum(maps[:number])
    torch.testing.assert_close(losses.total, 2.0 * (r - assistants_map).pow(2).mean(), rtol=1e-10, atol=0)
    losses.total.backward()
    trained = (f"assistants.{number - 1}.", f"assistant_adapters.{number - 1}.")
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, _ in model.named_parameters() if n.startswith(trained)}

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import Adapter, ResidualStudent, StudentAlone
from rkd_deploy.train.methods.base import Method, match_size
from rkd_deploy.train.methods.residual import AssistantStep, HeadStep, StudentStep, explained_variance, mse
from tests.support.adapters import adapted, learnt

CHANNELS, CLASSES, WEIGHT = 10, 4, 3.0
Make = Callable[[CifarResNet, ResidualStudent], Method]
STEPS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "student": (lambda T, model: StudentStep(T, model, WEIGHT), ("student.", "student_adapter.")),
    "assistant": (lambda T, model: AssistantStep(T, model, WEIGHT), ("assistants.", "assistant_adapters.")),
    "head": (lambda T, model: HeadStep(model), ("head.",)),
}


@pytest.fixture
def T() -> CifarResNet:
    """A teacher in float64 whose batch norms have seen something."""
    return used(CifarResNet(8, (6, 6, 8, CHANNELS), CLASSES).double())


@pytest.fixture
def model() -> ResidualStudent:
    """S and A in float64, A as if it had learnt something already."""
    student = ResidualStudent(
        CifarResNet(8, (4, 4, 6, 8), None), [CifarResNet(8, (2, 3, 4, 5), None)], CHANNELS, CLASSES
    )
    learnt(student.assistant_adapters[0])
    return used(student.double())


def used(module: Any) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Six images and labels."""
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def map_of(branch: CifarResNet, adapter: Adapter, x_NCHW: Tensor, *, training: bool) -> Tensor:
    """P f by matrices, of a copy: whatever it does to its batch norms stays there."""
    branch = copy.deepcopy(branch).train(training)
    return adapted(adapter, branch.features(x_NCHW)[-1], training=training)


# D


def test_distance_is_the_mean_over_all_elements() -> None:
    target, map_ = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.zeros(1, 1, 2, 2)
    assert mse(target, map_).item() == 7.5  # (1 + 4 + 9 + 16) / 4
    assert mse(target, target).item() == 0
    assert mse(target.repeat(5, 3, 1, 1), map_.repeat(5, 3, 1, 1)).item() == 7.5


def test_the_larger_of_two_maps_is_pooled_to_the_smaller() -> None:
    large, small = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 7, 2, 2)
    for pooled, other in (match_size(large, small), match_size(small, large)[::-1]):
        assert pooled.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
        assert other is small
    assert match_size(large, large)[0] is large


def test_explained_is_0_for_silence_and_1_for_the_target() -> None:
    target = torch.randn(2, 3, 4, 4)
    assert explained_variance(target, torch.zeros_like(target)).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(target, target).item() == 1
    assert explained_variance(target, target / 2).item() == pytest.approx(0.75)
    assert explained_variance(target, -target).item() == pytest.approx(-3)  # worse than silence


# The losses, against a second implementation


def test_student_loss(T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]) -> None:
    step, (x, y) = StudentStep(T, model, WEIGHT).train(), batch
    f_T = copy.deepcopy(T).eval().features(x)[-1]
    f_S = map_of(model.student, model.student_adapter, x, training=True)
    losses = step(x, y)
    error = (f_T - f_S).pow(2).sum() / f_T.pow(2).sum()
    torch.testing.assert_close(losses.total, WEIGHT * error, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["student"], error.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["explained"], (1 - error).detach())
    torch.testing.assert_close(losses.logits_NK, model.head(f_S.mean((2, 3))).detach())


def test_assistant_loss(T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]) -> None:
    step, (x, y) = AssistantStep(T, model, WEIGHT).train(), batch
    f_T = copy.deepcopy(T).eval().features(x)[-1]
    f_S = map_of(model.student, model.student_adapter, x, training=False)
    f_A = map_of(model.assistants[0], model.assistant_adapters[0], x, training=True)
    losses = step(x, y)
    error = (f_T - f_S - f_A).pow(2).sum() / f_T.pow(2).sum()  # in units of T's map, not of the residual
    torch.testing.assert_close(losses.total, WEIGHT * error, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["assistant"], error.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["explained"], (1 - error).detach())
    torch.testing.assert_close(losses.logits_NK, model.head((f_S + f_A).mean((2, 3))).detach())


def test_head_loss(model: ResidualStudent, batch: tuple[Tensor, Tensor]) -> None:
    step, (x, y) = HeadStep(model).train(), batch
    f_S = map_of(model.student, model.student_adapter, x, training=False)
    f_A = map_of(model.assistants[0], model.assistant_adapters[0], x, training=False)
    logits = model.head((f_S + f_A).mean((2, 3)))
    losses = step(x, y)
    wanted = (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()
    torch.testing.assert_close(losses.total, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.logits_NK, logits.detach(), rtol=1e-12, atol=1e-12)


def test_the_second_implementation_says_no_to_a_student_in_training_mode(
    T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]
) -> None:
    """S left in training mode would give another residual: what the frozen batch norms are about."""
    x, y = batch
    right = AssistantStep(T, model, WEIGHT).train()(x, y).total
    wrong = AssistantStep(T, model, WEIGHT).train()
    model.student.train()
    assert abs(wrong(x, y).total - right) > 1e-3 * right


def test_what_is_learnt_is_signed(T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]) -> None:
    """r = f_T - P_S f_S has both signs although f_T has one, and a few steps bring A nearer to it."""
    step, (x, y) = AssistantStep(T, model, 1.0).train(), batch
    with torch.no_grad():
        f_T, r = T.features(x)[-1], T.features(x)[-1] - model.student_map(x)
    assert (f_T >= 0).all()
    assert (r < 0).any()
    assert (r > 0).any()
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for _ in range(150):
        losses.append(step(x, y).total)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert ((model.assistant_map(x) < 0) & (r < 0)).any()


# Who learns


@pytest.mark.parametrize("name", STEPS)
def test_gradients_reach_only_what_is_trained(
    name: str, T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]
) -> None:
    make, trained = STEPS[name]
    step = make(T, model).train()
    step(*batch).total.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    wanted = {n for n, _ in model.named_parameters() if n.startswith(trained)}
    assert reached == wanted
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    if name != "head":  # no teacher there
        assert not any(p.requires_grad or p.grad is not None for p in T.parameters())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_moves_only_what_is_trained(
    name: str, T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]
) -> None:
    """Parameters and the running statistics of batch norm alike."""
    make, trained = STEPS[name]
    step = make(T, model).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = {key: value.clone() for key, value in T.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step(*batch).total.backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith(trained)}
    assert all(torch.equal(value, teacher[key]) for key, value in T.state_dict().items())


@pytest.mark.parametrize("name", STEPS)
def test_frozen_parts_stay_in_eval_mode_whatever_the_method_is_set_to(
    name: str, T: CifarResNet, model: ResidualStudent
) -> None:
    make, trained = STEPS[name]
    step = make(T, model)
    for mode in (True, False, True):
        step.train(mode)
        modes = {
            n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d | nn.Linear)
        }
        assert modes == {n: mode and f"{n}.".startswith(trained) for n in modes}
        if name != "head":
            assert not any(m.training for m in T.modules())


def test_each_step_thaws_what_the_one_before_froze(
    T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]
) -> None:
    for make, trained in STEPS.values():
        step = make(T, model).train()
        model.zero_grad(set_to_none=True)
        step(*batch).total.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, _ in model.named_parameters() if n.startswith(trained)
        }


# What ships


@torch.no_grad()
def test_deployable_is_what_the_step_is_about(
    T: CifarResNet, model: ResidualStudent, batch: tuple[Tensor, Tensor]
) -> None:
    student, assistant, head = (make(T, model).deployable().eval() for make, _ in STEPS.values())
    assert isinstance(student, StudentAlone)
    assert assistant is head is model
    x, _ = batch
    torch.testing.assert_close(student(x), model.head(model.student_map(x).mean((2, 3))))
    assert not torch.allclose(student(x), assistant(x))


def test_frozen_parts_are_not_saved_twice(T: CifarResNet, model: ResidualStudent) -> None:
    """The list of frozen modules registers nothing: a method's state is T's and the model's."""
    keys = set(StudentStep(T, model, WEIGHT).state_dict())
    assert keys == {f"teacher.{key}" for key in T.state_dict()} | {f"model.{key}" for key in model.state_dict()}

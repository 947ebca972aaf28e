from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from tests.support.adapters import adapted
from tests.support.adapters import learnt as made_up

CHANNELS, CLASSES = 12, 5


@pytest.fixture
def model() -> ResidualStudent:
    """S and A of different widths, in float64 and eval mode, batch norm with statistics as after training."""
    student = ResidualStudent(
        CifarResNet(8, (4, 4, 6, 8), None), [CifarResNet(8, (2, 3, 4, 5), None)], CHANNELS, CLASSES
    )
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return student.double().eval()


@pytest.fixture
def x_NCHW() -> Tensor:
    """Four images."""
    return torch.randn(4, 3, 16, 12, dtype=torch.float64)


def learnt(model: ResidualStudent) -> ResidualStudent:
    """The assistant's adapter as it might be after training."""
    made_up(model.assistant_adapters[0])
    return model


def by_hand(model: ResidualStudent, x_NCHW: Tensor) -> Tensor:
    """h(GAP(P_S f_S + P_A f_A)), with matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for branch, adapter in (
        (model.student, model.student_adapter),
        *zip(model.assistants, model.assistant_adapters, strict=True),
    ):
        total = total + adapted(adapter, branch.features(x_NCHW)[-1])
    pooled = total.sum((2, 3)) / (total.shape[2] * total.shape[3])
    return torch.einsum("ko,no->nk", model.head.weight, pooled) + model.head.bias


@torch.no_grad()
def test_the_sum_is_that_of_the_paper(model: ResidualStudent, x_NCHW: Tensor) -> None:
    learnt(model)
    torch.testing.assert_close(model(x_NCHW), by_hand(model, x_NCHW), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        model.summed_map(x_NCHW), model.student_map(x_NCHW) + model.assistant_map(x_NCHW), rtol=0, atol=0
    )
    assert model.summed_map(x_NCHW).shape == (4, CHANNELS, 4, 3)


@torch.no_grad()
def test_the_second_implementation_says_no_to_one_changed_weight(model: ResidualStudent, x_NCHW: Tensor) -> None:
    wanted = by_hand(learnt(model), x_NCHW)
    model.assistant_adapters[0].conv.weight[3] += 1e-6
    assert not torch.allclose(model(x_NCHW), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_before_it_has_learnt_the_assistant_adds_exactly_nothing(model: ResidualStudent, x_NCHW: Tensor) -> None:
    alone = StudentAlone(model).eval()
    assert not model.assistant_map(x_NCHW).any()
    assert torch.equal(model(x_NCHW), alone(x_NCHW))
    learnt(model)
    assert not torch.allclose(model(x_NCHW), alone(x_NCHW))


@torch.no_grad()
def test_the_assistant_can_be_negative_as_the_residual_is(model: ResidualStudent, x_NCHW: Tensor) -> None:
    learnt(model)
    assert (model.assistants[0].features(x_NCHW)[-1] >= 0).all()  # the ReLU at its end ...
    signed = model.assistant_map(x_NCHW)
    assert (signed < 0).any()  # ... is not the end of P_A f_A
    assert (signed > 0).any()


@torch.no_grad()
def test_a_linear_adapter_can_be_folded_with_pooling(model: ResidualStudent, x_NCHW: Tensor) -> None:
    """The identity that the export rests on: [W P_S | W P_A] [GAP s; GAP a] + W (b_S + b_A) + b."""
    learnt(model)
    adapters, head = [P.folded() for P in (model.student_adapter, model.assistant_adapters[0])], model.head
    matrix = torch.cat([head.weight @ adapter.weight[:, :, 0, 0] for adapter in adapters], 1)
    shift = head.weight @ sum(adapter.bias for adapter in adapters) + head.bias
    pooled = torch.cat([branch.features(x_NCHW)[-1].mean((2, 3)) for branch in (model.student, model.assistants[0])], 1)
    torch.testing.assert_close(pooled @ matrix.T + shift, model(x_NCHW), rtol=1e-12, atol=1e-12)


def test_the_student_alone_is_the_same_student(model: ResidualStudent) -> None:
    alone = StudentAlone(model)
    ours = dict(model.named_parameters())
    assert {name for name, _ in alone.named_parameters()} == {name for name in ours if "assistant" not in name}
    assert all(parameter is ours[name] for name, parameter in alone.named_parameters())


@pytest.mark.parametrize("k", [2, 3])
@torch.no_grad()
def test_a_chain_is_the_sum_of_its_branches(k: int, x_NCHW: Tensor) -> None:
    chain = [CifarResNet(8, (2, 3, 4, 5), None) for _ in range(k)]
    model = ResidualStudent(CifarResNet(8, (4, 4, 6, 8), None), chain, CHANNELS, CLASSES).double().eval()
    for adapter in model.assistant_adapters:
        made_up(adapter)
    torch.testing.assert_close(model(x_NCHW), by_hand(model, x_NCHW), rtol=1e-12, atol=1e-12)
    partial = model.student_map(x_NCHW)
    for i in range(1, k + 1):
        assert not torch.allclose(model.summed_map(x_NCHW, i), partial)
        partial = partial + model.assistant_map(x_NCHW, i)
        assert torch.equal(model.summed_map(x_NCHW, i), partial)

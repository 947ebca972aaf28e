"""Adapters fold into one convolution, exactly; those of earlier runs are read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import Adapter, ResidualStudent, as_convolution, with_norms
from tests.support.adapters import adapted, learnt


@torch.no_grad()
def test_the_folded_convolution_is_the_adapter_in_eval_mode() -> None:
    adapter = learnt(Adapter(5, 7)).double()
    f = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    wanted = adapted(adapter, f)
    torch.testing.assert_close(adapter.eval()(f), wanted, rtol=0, atol=1e-10)
    folded = adapter.folded()
    torch.testing.assert_close(folded(f), wanted, rtol=0, atol=1e-10)
    assert as_convolution(folded) is folded
    assert folded.weight.dtype == torch.float64
    torch.testing.assert_close(adapter.train()(f), adapted(adapter, f, training=True), rtol=0, atol=1e-10)
    assert (adapter(f) - wanted).abs().max() > 1e-3  # statistics of the batch are others


def test_a_silent_adapter_gives_nothing_and_can_begin_to_learn() -> None:
    adapter = Adapter(5, 7, silent=True)
    m = adapter(torch.randn(3, 5, 4, 6))
    assert not m.any()
    (m - torch.randn(m.shape)).square().sum().backward()
    assert adapter.norm.weight.grad is not None
    assert adapter.norm.weight.grad.all()


@torch.no_grad()
def test_weights_of_before_batch_norm_give_what_they_gave() -> None:
    model = ResidualStudent(CifarResNet(8, (4, 4, 6, 8), None), [CifarResNet(8, (2, 3, 4, 5), None)], 10, 4).eval()
    plain = {"student_adapter": nn.Conv2d(8, 10, 1), "assistant_adapters.0": nn.Conv2d(5, 10, 1)}
    state = {key: value for key, value in model.state_dict().items() if "_adapter" not in key}
    for name, conv in plain.items():
        state |= {f"{name}.{key}": value for key, value in conv.state_dict().items()}
    model.load_state_dict(with_norms(state, model), strict=False)
    f_S, f_A = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(model.student_adapter(f_S), plain["student_adapter"](f_S))
    torch.testing.assert_close(model.assistant_adapters[0](f_A), plain["assistant_adapters.0"](f_A))
    new = model.state_dict()
    assert with_norms(new, model).keys() == new.keys()


@pytest.mark.parametrize("channels", [1, 9])
def test_parameters_are_those_that_a_budget_counts(channels: int) -> None:
    assert sum(parameter.numel() for parameter in Adapter(5, channels).parameters()) == 5 * channels + 2 * channels

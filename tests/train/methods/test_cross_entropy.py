from __future__ import annotations

import torch

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.train.methods.baseline import CrossEntropy


def test_loss_is_the_mean_negative_log_probability() -> None:
    model = CifarResNet(8, (4, 4, 4, 4), 3).double()
    method = CrossEntropy(model).eval()
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    losses = method(x, y)
    logits = model(x)
    wanted = (logits.exp().sum(1).log() - logits[torch.arange(5), y]).mean()
    torch.testing.assert_close(losses.total, wanted, rtol=1e-12, atol=0)
    assert losses.parts["ce"] == losses.total
    assert torch.equal(losses.logits_NK, logits)
    assert not losses.parts["ce"].requires_grad
    assert not losses.logits_NK.requires_grad
    assert not torch.allclose(method(x, y.flip(0)).total, wanted)  # says no to other labels


def test_the_whole_model_is_trained_even_if_it_was_frozen() -> None:
    model = CifarResNet(8, (4, 4, 4, 4), 3).requires_grad_(False)
    method = CrossEntropy(model).train()
    method(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert method.deployable() is model

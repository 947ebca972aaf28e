"""KD and DKD against second implementations, their identities, and extreme logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rkd_deploy.data.augment import smoothed
from rkd_deploy.train.methods.base import BaseLoss, View, WeightedLoss
from rkd_deploy.train.methods.dkd import DKD, dkd_loss
from rkd_deploy.train.methods.kd import KD, kd_loss, standardised_logits

N, K = 6, 5
Logits = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def logits() -> Logits:
    """Logits of T and S, and labels."""
    z_T, z_S = 3 * torch.randn(2, N, K, dtype=torch.float64)
    return z_T, z_S, torch.tensor([0, 1, 2, 3, 4, 0])


def probabilities(z: list[float], tau: float) -> list[float]:
    exponentials = [math.exp(value / tau) for value in z]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def parts(z_T: Tensor, z_S: Tensor, y: int, tau: float) -> tuple[float, float, float, float]:
    """KL, TCKD, NCKD and p_T of the label, of one image."""
    p, q = (probabilities(z.tolist(), tau) for z in (z_T, z_S))
    others = [[value / (1 - r[y]) for index, value in enumerate(r) if index != y] for r in (p, q)]
    return kl(p, q), kl([p[y], 1 - p[y]], [q[y], 1 - q[y]]), kl(*others), p[y]


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_against_a_second_implementation(logits: Logits, tau: float) -> None:
    z_T, z_S, y = logits
    rows = [parts(*row, tau) for row in zip(z_T, z_S, y.tolist(), strict=True)]
    assert kd_loss(z_T, z_S, tau).item() == pytest.approx(tau**2 * sum(row[0] for row in rows) / N, rel=1e-12)
    for alpha, beta in ((1, 0), (0, 1), (1, 8)):
        wanted = tau**2 * sum(alpha * row[1] + beta * row[2] for row in rows) / N
        assert dkd_loss(z_T, z_S, y, alpha, beta, tau).item() == pytest.approx(wanted, rel=1e-12)


def test_known_numbers() -> None:
    """T is sure to 3/4 and S to 1/2 of the first of two classes."""
    z_T, z_S = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd_loss(z_T, z_S, 1).item() == pytest.approx(wanted)
    assert dkd_loss(z_T, z_S, torch.tensor([0]), 1, 8, 1).item() == pytest.approx(wanted)  # one other class: NCKD = 0
    assert kd_loss(4 * z_T, z_S, 4).item() == pytest.approx(16 * wanted)


def test_decoupled_parts_recombine_to_kd(logits: Logits) -> None:
    """KL = TCKD + (1 - p_t) NCKD, image by image."""
    tau = 4.0
    for row in range(N):
        z_T, z_S, y = (value[row : row + 1] for value in logits)
        p_t = (z_T / tau).softmax(1)[0, y].item()
        tckd, nckd = (dkd_loss(z_T, z_S, y, alpha, beta, tau).item() for alpha, beta in ((1, 0), (0, 1)))
        assert tckd + (1 - p_t) * nckd == pytest.approx(kd_loss(z_T, z_S, tau).item(), rel=1e-10)


def test_equal_logits_are_at_0_and_a_shift_of_all_changes_nothing(logits: Logits) -> None:
    z_T, z_S, y = logits
    assert kd_loss(z_T, z_T + 7, 4).item() == pytest.approx(0, abs=1e-12)
    assert dkd_loss(z_T, z_T - 7, y, 1, 8, 4).item() == pytest.approx(0, abs=1e-12)
    assert kd_loss(z_T, z_S + 7, 4).item() == pytest.approx(kd_loss(z_T, z_S, 4).item())


def test_standardised_logits_have_mean_0_and_deviation_1_and_forget_their_range(logits: Logits) -> None:
    z_T, z_S, y = logits
    rows = standardised_logits(5 * z_T + 3)
    assert rows.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(
        ((rows**2).sum(1) / (K - 1)).sqrt(), torch.ones(N, dtype=torch.float64), atol=1e-6, rtol=0
    )
    views = View((), z_T), View((), 2 * z_T + 1)
    assert KD(2.0, standardise=True)(*views, y).item() == pytest.approx(0, abs=1e-10)
    assert DKD(1.0, 8.0, 2.0, standardise=True)(*views, y).item() == pytest.approx(0, abs=1e-10)
    assert KD(2.0, standardise=False)(*views, y).item() > 0.01
    loss = KD(2.0, standardise=True)(View((), z_T), View((), z_S), y)
    torch.testing.assert_close(loss, kd_loss(standardised_logits(z_T), standardised_logits(z_S), 2))
    assert standardised_logits(torch.ones(2, K)).abs().max() == 0  # rows without any spread


LOSSES: list[BaseLoss] = [KD(4.0, False), KD(4.0, True), DKD(1.0, 8.0, 4.0, False), DKD(1.0, 8.0, 4.0, True)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.standardise}")
@pytest.mark.parametrize("scale", [1e4, 1e10])
def test_extreme_logits_give_finite_losses_and_gradients(loss: BaseLoss, scale: float) -> None:
    y = torch.tensor([0, 1, 2, 0])
    sure = scale * torch.tensor([[1.0, 0, 0], [-1, 1, -1], [0, 0, -1], [0, 0, 0]])
    for z_T, z_S in ((sure, -sure), (sure, sure), (torch.zeros_like(sure), sure), (sure, torch.zeros_like(sure))):
        z_S = z_S.clone().requires_grad_()
        value = loss(View((), z_T), View((), z_S), y)
        (gradient,) = torch.autograd.grad(value, z_S)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.standardise}")
def test_gradients_are_those_of_differences(loss: BaseLoss, logits: Logits) -> None:
    z_T, z_S, y = logits
    assert torch.autograd.gradcheck(lambda z: loss(View((), z_T), View((), z), y), z_S.requires_grad_())


def test_the_published_weights_and_their_warm_up(logits: Logits) -> None:
    z_T, z_S, y = logits
    views = View((), z_T), View((), z_S)
    kd, dkd = WeightedLoss(KD(4.0, False)), WeightedLoss(DKD(1.0, 8.0, 4.0, False))
    assert (kd.loss.weight, kd.loss.ce_weight, dkd.loss.weight, dkd.loss.ce_weight) == (0.9, 0.1, 1.0, 1.0)
    for epoch, part in ((1, 0.05), (10, 0.5), (20, 1), (240, 1)):
        dkd.start_epoch(epoch)
        kd.start_epoch(epoch)
        weighted, plain = dkd(*views, y)
        assert weighted.item() == pytest.approx(part * plain.item())
        assert kd(*views, y)[0].item() == pytest.approx(0.9 * kd_loss(z_T, z_S, 4).item())
    borrowed = WeightedLoss(KD(4.0, False), weight=3.0, warmup_epochs=4)
    borrowed.start_epoch(1)
    assert borrowed.weight == 0.75


def test_dkd_takes_the_class_of_a_smoothed_target() -> None:
    z_T, z_S, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    hard, soft = dkd_loss(z_T, z_S, y, 1.0, 8.0, 4.0), dkd_loss(z_T, z_S, smoothed(y, 5, 0.2), 1.0, 8.0, 4.0)
    assert torch.equal(hard, soft)
    assert not torch.equal(hard, dkd_loss(z_T, z_S, smoothed(y.roll(1), 5, 0.2), 1.0, 8.0, 4.0))

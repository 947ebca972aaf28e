"""D against closed forms; assistants, which start at 0, can begin to learn under each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rkd_deploy.train.methods.residual import DISTANCES, relative


def second(name: str, t: Tensor, m: Tensor) -> float:
    """Distances a second time, image by image, in NumPy."""
    values = []
    for t_n, m_n in zip(t.numpy(), m.numpy(), strict=True):
        d = np.abs(t_n - m_n)
        length = max(np.sqrt((m_n**2).sum()), 0.1 * np.sqrt((t_n**2).sum()))
        values.append(
            {
                "relative": (d**2).mean() / (t.numpy() ** 2).mean(),
                "mse": (d**2).mean(),
                "normalised_mse": (d**2).sum() / (t_n**2).sum(),
                "smooth_l1": np.where(d < 1, d**2 / 2, d - 0.5).mean(),
                "cosine": 1 - (t_n * m_n).sum() / np.sqrt((t_n**2).sum()) / length,
            }[name]
        )
    return float(np.mean(values))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_against_a_second_implementation(name: str, scale: float) -> None:
    t, m = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    assert DISTANCES[name](t, scale * m).item() == pytest.approx(second(name, t, scale * m), rel=1e-12)


def test_known_numbers() -> None:
    t, m = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    wanted = {"relative": 9 / 25, "mse": 4.5, "normalised_mse": 9 / 25, "smooth_l1": 1.25, "cosine": 1 - 16 / 20}
    assert {name: D(t, m).item() for name, D in DISTANCES.items()} == pytest.approx(wanted)


def test_a_residual_is_measured_in_units_of_the_teachers_map() -> None:
    f_T, s, a = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    distance, alone = (relative(f_T - s, a, *T) for T in ((f_T,), ()))
    assert distance.item() == pytest.approx(relative(f_T, s + a).item(), rel=1e-12)
    assert distance.item() != pytest.approx(alone.item(), rel=0.01)
    assert relative(7 * (f_T - s), 7 * a, 7 * f_T).item() == pytest.approx(distance.item(), rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_target_itself_is_at_distance_0_and_silence_is_not(name: str) -> None:
    t = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert DISTANCES[name](t, t).item() == pytest.approx(0, abs=1e-12)
    assert DISTANCES[name](t, torch.zeros_like(t)).item() > 0.1


def test_what_each_one_does_not_see() -> None:
    t, m = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    factor = torch.tensor([1.0, 10, 0.1, 7], dtype=torch.float64).view(-1, 1, 1, 1)
    for name, blind in (
        ("normalised_mse", True),
        ("cosine", True),
        ("relative", False),
        ("mse", False),
        ("smooth_l1", False),
    ):
        scaled = DISTANCES[name](factor * t, factor * m).item()
        assert (scaled == pytest.approx(DISTANCES[name](t, m).item())) is blind  # how strong an image's target is
    assert DISTANCES["cosine"](t, 3 * m).item() == pytest.approx(DISTANCES["cosine"](t, m).item())
    assert DISTANCES["normalised_mse"](t, 3 * m).item() != pytest.approx(DISTANCES["normalised_mse"](t, m).item())


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("start", ["zero map", "zero target", "both"])
def test_gradients_at_zero_are_finite_and_lead_to_the_target(name: str, start: str) -> None:
    t, m = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    t = torch.zeros_like(t) if start != "zero map" else t
    m = (torch.zeros_like(m) if start != "zero target" else 1e-3 * m).requires_grad_()
    D = DISTANCES[name](t, m)
    (gradient,) = torch.autograd.grad(D, m)
    assert math.isfinite(D.item())
    assert gradient.isfinite().all()
    if start == "zero map":
        cosine = -(gradient * t).sum() / gradient.norm() / t.norm()
        assert cosine > 0.8
        assert gradient.norm() < 100


def test_half_precision_maps_are_compared_in_full_precision() -> None:
    t = torch.randn(4, 8, 5, 5).bfloat16()
    m = (t.float() + 0.1 * torch.randn(4, 8, 5, 5)).bfloat16()
    for name in ("relative", "normalised_mse", "cosine"):
        distance = DISTANCES[name](t, m)
        assert distance.dtype == torch.float32
        assert distance.item() == pytest.approx(second(name, t.double(), m.double()), rel=1e-4)

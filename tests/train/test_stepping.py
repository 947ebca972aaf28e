"""One update by every setting of [train], against plain PyTorch or made otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.methods.base import Losses
from rkd_deploy.train.methods.baseline import CrossEntropy
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Average, Stepper

BATCH, CLASSES = 8, 4


def plain() -> nn.Module:
    """Without batch norm, whose statistics depend on how a batch is cut."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, CLASSES))
    return layers.double()


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x_NCHW = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=dtype)
    return x_NCHW, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def recipe(**how: Any) -> TrainRecipe:
    return TrainRecipe(**{"batch_size": BATCH, "weight_decay": 1e-2, "device": "cpu", **how})


def stepped(module: nn.Module, steps: int = 4, dtype: torch.dtype = torch.float64, **how: Any) -> dict[str, Tensor]:
    stepper = Stepper(CrossEntropy(module), recipe(**how))
    stepper.start_epoch(1)
    for number in range(steps):
        stepper.step(*batch(number, dtype), 0.1)
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_pieces_of_a_batch_add_up_to_the_batch(pieces: int) -> None:
    assert_close(stepped(plain(), accumulate=pieces), stepped(plain()), 1e-13)


def test_pieces_tell_the_losses_of_the_batch() -> None:
    (x, y), whole, cut = batch(0), EpochSums(), EpochSums()
    whole.add(Stepper(CrossEntropy(plain()), recipe()).step(x, y, 0.1), y, 1)
    cut.add(Stepper(CrossEntropy(plain()), recipe(accumulate=4)).step(x, y, 0.1), y, 1)
    assert cut.means() == pytest.approx(whole.means(), rel=1e-12)


def test_gradients_are_clipped_to_a_global_norm_which_is_told() -> None:
    """Against SGD by hand: theta - lr g / |g| max_norm, and the norm before."""
    module, (x, y), limit = plain(), batch(0), 0.01
    before = [parameter.detach().clone() for parameter in module.parameters()]
    gradients = torch.autograd.grad(cross_entropy(module(x), y), list(module.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > limit
    stepper = Stepper(CrossEntropy(module), recipe(clip_norm=limit, momentum=0.0, weight_decay=0.0))
    losses = stepper.step(x, y, 0.5)
    torch.testing.assert_close(losses.parts["grad_norm"], norm)
    for parameter, start, gradient in zip(module.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.5 * gradient * limit / norm, rtol=1e-5, atol=1e-9)


def test_what_is_below_the_norm_is_left_alone() -> None:
    ours, theirs = stepped(plain(), clip_norm=1e6), stepped(plain())
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_average_is_the_closed_form_of_weights_and_statistics() -> None:
    """After n updates: d^(n-1) theta_1 + (1 - d) sum_k d^(n-k) theta_k."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, decay, states = Average(module, 0.75), 0.75, []
    for number in range(1, 5):
        with torch.no_grad():
            for value in module.state_dict().values():
                value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(number))
        states.append({key: value.clone() for key, value in module.state_dict().items()})
        average.update()
    for key in states[0]:
        if not states[0][key].is_floating_point():
            continue
        expected = decay**3 * states[0][key] + sum(
            (1 - decay) * decay ** (4 - k) * states[k - 1][key] for k in (2, 3, 4)
        )
        torch.testing.assert_close(average.weights()[key], expected, rtol=1e-12, atol=1e-12)


def looked_at(module: nn.Module, trained: dict[str, Tensor]) -> None:
    torch.testing.assert_close(next(module.parameters()).detach(), trained["0.weight"] + 0.5)
    raise KeyError


def test_the_average_stands_in_and_gives_the_weights_back() -> None:
    module = plain()
    average = Average(module, 0.5)
    trained = {key: value.clone() for key, value in module.state_dict().items()}
    average.update()
    with torch.no_grad():
        next(module.parameters()).add_(1)
    average.update()
    moved = next(module.parameters()).detach().clone()
    with pytest.raises(KeyError), average.in_place():
        looked_at(module, trained)
    assert torch.equal(next(module.parameters()), moved)


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8, (8, 8, 8, 8), CLASSES)


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    module = network()
    ours, theirs = stepped(module, dtype=torch.float32, channels_last=True), stepped(network(), dtype=torch.float32)
    convolution = next(parameter for parameter in module.parameters() if parameter.ndim == 4 and parameter.shape[2] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, theirs, 1e-4)


@pytest.mark.slow
def test_compiled_it_learns_the_same() -> None:
    ours, theirs = (stepped(plain(), steps=2, compile=how) for how in (True, False))
    assert_close(ours, theirs, 1e-10)


class Weighted(CrossEntropy):
    """Weight 1 of its only part, as an S has that learns by its map alone."""

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        losses = super().forward(x_NCHW, y_N)
        return losses._replace(total=1.0 * losses.total)


@pytest.mark.slow
def test_compiled_a_loss_of_weight_one_keeps_its_gradient() -> None:
    """Inductor by itself gives a loss that nothing can be learnt from."""
    ends = []
    for how in (True, False):
        module = plain()
        Stepper(Weighted(module), recipe(compile=how)).step(*batch(0), 0.1)
        ends.append({key: value.clone() for key, value in module.state_dict().items()})
    assert_close(*ends, 1e-10)


@pytest.mark.parametrize(
    ("bad", "step", "names"),
    [({"b": 2}, 2, ["b"]), ({"b": 3, "c": 3}, 3, ["b", "c"]), ({"loss": 1, "c": 2}, 1, ["loss"])],
)
def test_the_first_bad_step_and_its_terms_are_found_without_looking_at_each(
    bad: dict[str, int], step: int, names: list[str]
) -> None:
    sums, y = EpochSums(), torch.zeros(2).long()
    for number in range(1, 5):
        values = {name: torch.tensor(float("nan" if number >= bad.get(name, 9) else 1)) for name in ("loss", "b", "c")}
        total = values.pop("loss")
        sums.add(Losses(total, values, torch.zeros(2, CLASSES)), y, number)
    assert sums.first_bad() == (step, names)

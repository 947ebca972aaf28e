"""AT, FitNet, ReviewKD and SimKD against second implementations, and what they train."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.errors import RecipeError
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.staged import stage_shapes
from rkd_deploy.recipe import MethodRecipe
from rkd_deploy.train.methods import base_loss
from rkd_deploy.train.methods.attention import attention, attention_loss
from rkd_deploy.train.methods.base import View, match_size, pair_stages, view_teacher
from rkd_deploy.train.methods.baseline import Distilled
from rkd_deploy.train.methods.fitnet import FitNet
from rkd_deploy.train.methods.reviewkd import ReviewKD, hierarchical_context_loss
from rkd_deploy.train.methods.simkd import ReusedClassifier, SimKD

CLASSES = 4
SHAPES_T, SHAPES_S = [(4, 8, 8), (6, 4, 4), (8, 2, 2)], [(3, 8, 8), (4, 4, 4), (5, 2, 2)]


def maps(shapes: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(5, *shape, dtype=torch.float64).relu() for shape in shapes)


@pytest.fixture
def views() -> tuple[View, View, Tensor]:
    """Of T and S, and labels."""
    z = torch.randn(2, 5, CLASSES, dtype=torch.float64)
    return View(maps(SHAPES_T), z[0]), View(maps(SHAPES_S), z[1]), torch.tensor([0, 1, 2, 3, 0])


def scrambled(module: Any) -> Any:
    """Weights and statistics as after training, in float64 and eval mode."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            value.data.uniform_(*((0.5, 1.5) if name.endswith("running_var") else (-0.5, 0.5)))
    return module.double().eval()


def batch_norm(x: Tensor, layer: Any) -> Tensor:
    shape = (1, -1, 1, 1)
    scaled = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + layer.eps).sqrt()
    return scaled * layer.weight.view(shape) + layer.bias.view(shape)


def one_by_one(x: Tensor, layer: Any) -> Tensor:
    out = torch.einsum("oc,nchw->nohw", layer.weight[:, :, 0, 0], x)
    return out if layer.bias is None else out + layer.bias.view(1, -1, 1, 1)


# AT


def test_attention_transfer(views: tuple[View, View, Tensor]) -> None:
    T, S, _ = views
    wanted = 0.0
    for f_T, f_S in zip(T.maps, S.maps, strict=True):
        rows = []
        for f in (f_T.numpy(), f_S.numpy()):
            q = (f**2).sum(1).reshape(len(f), -1)  # the paper's sum over channels; the code takes their mean
            rows.append(q / np.sqrt((q**2).sum(1, keepdims=True)))
        wanted += ((rows[0] - rows[1]) ** 2).mean()
    assert attention_loss(T.maps, S.maps).item() == pytest.approx(wanted, rel=1e-12)


def test_attention_knows_no_scale_and_no_channels(views: tuple[View, View, Tensor]) -> None:
    T, S, _ = views
    scaled = [7 * f for f in S.maps]
    assert attention_loss(T.maps, scaled).item() == pytest.approx(attention_loss(T.maps, S.maps).item(), rel=1e-9)
    assert attention_loss(T.maps, [-3 * f for f in T.maps]).item() == pytest.approx(0, abs=1e-12)
    assert attention(torch.zeros(2, 3, 4, 4)).abs().max() == 0  # a dead map divides nothing by nothing
    one_place = torch.zeros(1, 2, 2, 2)
    one_place[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    assert attention(one_place).tolist() == [[0, 1, 0, 0]]


# FitNet


def test_fitnet(views: tuple[View, View, Tensor]) -> None:
    T, S, y = views
    for stage in (1, 2, 3):
        loss = scrambled(FitNet(SHAPES_T, SHAPES_S, stage))
        convolution, norm, _ = loss.regressor
        hint = batch_norm(one_by_one(S.maps[stage - 1], convolution), norm).clamp_min(0)
        assert loss(T, S, y).item() == pytest.approx((hint - T.maps[stage - 1]).pow(2).mean().item(), rel=1e-12)


def test_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.hint_stage = 4; T and S both have stages 1 to 3"):
        FitNet(SHAPES_T, SHAPES_S, 4)


# ReviewKD


def test_hierarchical_context_loss() -> None:
    u, f = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)

    def pooled(x: Tensor, size: int) -> Tensor:
        step = 8 // size
        return x.unfold(2, step, step).unfold(3, step, step).mean((4, 5))

    wanted = sum(w * (pooled(u, n) - pooled(f, n)).pow(2).mean() for w, n in ((1, 8), (0.5, 4), (0.25, 2), (0.125, 1)))
    torch.testing.assert_close(hierarchical_context_loss(u, f), wanted / 1.875)
    pixel = torch.randn(2, 3, 4, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(hierarchical_context_loss(*pixel), (pixel[0] - pixel[1]).pow(2).mean())
    assert hierarchical_context_loss(f, f) == 0


def test_reviewkd(views: tuple[View, View, Tensor]) -> None:
    T, S, y = views
    loss = scrambled(ReviewKD(SHAPES_T, SHAPES_S))
    levels_T, levels_S = ([*v.maps, v.maps[-1].mean((2, 3), keepdim=True)] for v in (T, S))
    wanted, below = torch.zeros((), dtype=torch.float64), None
    for fusion, f_S, f_T in list(zip(loss.fusions, levels_S, levels_T, strict=True))[::-1]:
        x = batch_norm(one_by_one(f_S, fusion.narrow[0]), fusion.narrow[1])
        if below is not None:
            up = below.repeat_interleave(x.shape[2] // below.shape[2], 2)
            up = up.repeat_interleave(x.shape[3] // below.shape[3], 3)
            gates = 1 / (1 + (-one_by_one(torch.cat([x, up], 1), fusion.attention[0])).exp())
            x = gates[:, :1] * x + gates[:, 1:] * up
        below = x
        windows = nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        u = batch_norm(torch.einsum("ocij,nchwij->nohw", fusion.out[0].weight, windows), fusion.out[1])
        assert u.shape == f_T.shape
        wanted = wanted + hierarchical_context_loss(u, f_T)
    torch.testing.assert_close(loss(T, S, y), wanted, rtol=1e-10, atol=0)
    assert (loss.fusions[-1].attention is None) is (loss.fusions[0].attention is not None)  # only the deepest


# SimKD


def test_simkd_and_the_classifier_that_it_reuses() -> None:
    T, S0 = (scrambled(CifarResNet(8, widths, CLASSES)) for widths in ((4, 4, 6, 8), (3, 3, 4, 5)))
    reused = scrambled(ReusedClassifier(S0.rebuilt(S0.widths, None), 8, nn.Linear(8, CLASSES), 2))
    reused.fc.load_state_dict(T.fc.state_dict())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        f = reused.backbone.features(x)[-1]
        layers = reused.projector
        f = batch_norm(one_by_one(f, layers[0]), layers[1]).clamp_min(0)
        windows = nn.functional.pad(f, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        f = batch_norm(torch.einsum("ocij,nchwij->nohw", layers[3].weight, windows), layers[4]).clamp_min(0)
        f = batch_norm(one_by_one(f, layers[6]), layers[7]).clamp_min(0)
        z = f.mean((2, 3)) @ T.fc.weight.T + T.fc.bias
        torch.testing.assert_close(reused(x), z, rtol=1e-10, atol=1e-12)
        assert layers[0].weight.shape[:2] == (4, 5)  # C_T / f, C_S
        loss = SimKD(stage_shapes(T, (8, 8)), stage_shapes(reused, (8, 8)), None)
        value = loss(view_teacher(T, x), View(reused.features(x), z), torch.zeros(3))
    assert value.item() == pytest.approx((T.features(x)[-1] - f).pow(2).mean().item(), rel=1e-10)
    assert not list(loss.parameters())


# The contract


def test_views_and_pairs() -> None:
    T = scrambled(CifarResNet(8, (4, 4, 6, 8), CLASSES))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    view = view_teacher(T, x)
    torch.testing.assert_close(view.logits_NK, T(x))
    assert not any(value.requires_grad for value in (*view.maps, view.logits_NK))
    assert stage_shapes(T.float().train(), (8, 12)) == [(4, 8, 12), (6, 4, 6), (8, 2, 3)]
    assert T.training
    assert pair_stages(view.maps, view.maps[1:]) == [(view.maps[1], view.maps[1]), (view.maps[2], view.maps[2])]
    first, other = match_size(torch.zeros(1, 2, 8, 8), torch.arange(8.0).view(1, 1, 2, 4))
    assert (first.shape, other.shape) == ((1, 2, 2, 4), (1, 1, 2, 4))


LOSSES = ("kd", "fitnet", "at", "dkd", "reviewkd", "simkd")


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_network_and_the_adapters_and_never_the_teacher(name: str) -> None:
    T = CifarResNet(8, (4, 4, 6, 8), CLASSES)
    S0 = CifarResNet(8, (3, 3, 4, 5), CLASSES)
    base = base_loss(MethodRecipe(base=name), T, S0, (8, 8))
    method = Distilled(T, S0, base, ce_weight=0.0).train()
    before = copy.deepcopy(T.state_dict())
    losses = method(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))
    losses.total.backward()
    reached = {n for n, p in S0.named_parameters() if p.grad is not None and p.grad.any()}
    head = {"fc.weight", "fc.bias"}
    last = {n for n, _ in S0.named_parameters() if n.startswith("layer3")}
    body = {n for n, _ in S0.named_parameters()} - head
    assert reached == {"kd": body | head, "dkd": body | head, "fitnet": body - last}.get(name, body)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in base.parameters())
    assert bool(list(base.parameters())) is (name in ("fitnet", "reviewkd", "simkd"))
    assert not any(p.requires_grad or p.grad is not None for p in T.parameters())
    assert not T.training
    assert all(torch.equal(value, before[key]) for key, value in T.state_dict().items())
    assert method.deployable() is S0
    assert method.auxiliary() is base


def test_taught_adds_cross_entropy_and_the_weighted_loss() -> None:
    T, S0 = (CifarResNet(8, widths, CLASSES) for widths in ((4, 4, 6, 8), (3, 3, 4, 5)))
    method = Distilled(T, S0, base_loss(MethodRecipe(name="at", base_weight=50.0), T, S0, (8, 8)), ce_weight=0.3).eval()
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    losses = method(x, y)
    z = S0(x)
    ce = (z.exp().sum(1).log() - z[torch.arange(4), y]).mean()
    torch.testing.assert_close(losses.total, 0.3 * ce + 50 * attention_loss(T.features(x), S0.features(x)))
    torch.testing.assert_close(losses.logits_NK, z.detach())


def test_the_reused_head_is_not_trained() -> None:
    T, S0 = (CifarResNet(8, widths, CLASSES) for widths in ((4, 4, 6, 8), (3, 3, 4, 5)))
    reused = ReusedClassifier(S0.rebuilt(S0.widths, None), 8, nn.Linear(8, CLASSES), 2)
    method = Distilled(T, reused, base_loss(MethodRecipe(name="simkd"), T, reused, (8, 8)), ce_weight=1.0).train()
    method(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])).total.backward()
    assert {n for n, p in reused.named_parameters() if p.grad is None} == {"fc.weight", "fc.bias"}

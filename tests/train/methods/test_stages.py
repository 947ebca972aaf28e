"""The residual at several stages: losses a second time, adapters that do not ship."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.errors import RecipeError
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import Adapter, ResidualStudent, StageAdapters
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.fitting import fit
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.residual import AssistantStep, HeadStep, StudentStep, mse
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.weights import load_tensors
from tests.support.adapters import adapted, learnt

W, V = 3.0, 0.7
STAGES = (1, 2)
Batch = tuple[Tensor, Tensor]


def used(module: Any) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


@pytest.fixture
def T() -> CifarResNet:
    """In float64."""
    return used(CifarResNet(8, (6, 6, 8, 10), 4).double())


@pytest.fixture
def model() -> ResidualStudent:
    """S and two assistants that have learnt something, with adapters at the first two stages."""
    widths = ((4, 4, 6, 8), (2, 3, 4, 5), (2, 2, 3, 4))
    student = ResidualStudent(CifarResNet(8, widths[0], None), [CifarResNet(8, w, None) for w in widths[1:]], 10, 4)
    student.stage_adapters = StageAdapters(STAGES, [w[1:] for w in widths], (6, 8))
    for module in student.modules():
        if isinstance(module, Adapter):
            learnt(module, std=0.3)
    return used(student.double())


@pytest.fixture
def batch() -> Batch:
    """Six images and labels."""
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def maps_by_hand(model: ResidualStudent, x: Tensor, branch: int, *, training: bool) -> list[Tensor]:
    """Adapted maps at all three stages, by matrices, of a copy."""
    copied = copy.deepcopy(model)
    network, P = copied.branches()[branch]
    assert copied.stage_adapters is not None
    adapters = [*copied.stage_adapters.adapters[branch], P]
    maps = network.train(training).features(x)
    pairs = zip(adapters, maps, strict=True)
    return [adapted(R, f, training=training) for R, f in pairs]


def weighed(targets: list[Tensor], maps: list[Tensor]) -> Tensor:
    first, second, last = ((t - m).pow(2).mean() for t, m in zip(targets, maps, strict=True))
    return last + V * (first + second)


def test_student_and_assistants(T: CifarResNet, model: ResidualStudent, batch: Batch) -> None:
    x, y = batch
    f_T = list(copy.deepcopy(T).eval().features(x))
    S = maps_by_hand(model, x, 0, training=True)
    losses = StudentStep(T, model, W, distance=mse, stage_weight=V).train()(x, y)
    torch.testing.assert_close(losses.total, W * weighed(f_T, S), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.parts["student"], (f_T[-1] - S[-1]).pow(2).mean().detach())
    for number in (1, 2):
        step = AssistantStep(T, model, W, distance=mse, stage_weight=V, number=number).train()
        before = [maps_by_hand(model, x, b, training=False) for b in range(number)]
        r = [t - sum(maps) for t, *maps in zip(f_T, *before, strict=True)]
        branch_maps = maps_by_hand(model, x, number, training=True)
        torch.testing.assert_close(step(x, y).total, W * weighed(r, branch_maps), rtol=1e-12, atol=0)


@pytest.mark.parametrize("detach", [True, False])
def test_end_to_end(T: CifarResNet, model: ResidualStudent, batch: Batch, detach: bool) -> None:
    x, y = batch
    f_T = list(copy.deepcopy(T).eval().features(x))
    S, A, B = (maps_by_hand(model, x, b, training=True) for b in (0, 1, 2))
    r = [t - s for t, s in zip(f_T, S, strict=True)]
    wanted = W * weighed(f_T, S) + 2 * W / 2 * weighed(r, A)
    wanted = wanted + 2 * W / 2 * 0.5 * weighed([residual - a for residual, a in zip(r, A, strict=True)], B)
    weights = Weights(feature=W, assistant=2.0, ce=0.0, student=0.0, step_decay=0.5, stage=V)
    step = EndToEnd(T, model, mse, weights, detach=detach, train_head=False).train()
    losses = step(x, y)
    torch.testing.assert_close(losses.total, wanted, rtol=1e-12, atol=0)
    losses.total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached >= {name for name, _ in model.named_parameters() if name.startswith("stage_adapters")}


def test_each_phase_moves_its_own_adapters_alone(T: CifarResNet, model: ResidualStudent, batch: Batch) -> None:
    for branch in (0, 1, 2):
        step = StudentStep(T, model, W) if branch == 0 else AssistantStep(T, model, W, number=branch)
        step.train()(*batch).total.backward()
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        early = {name for name in learning if name.startswith("stage_adapters")}
        assert early == {
            name for name, _ in model.named_parameters() if name.startswith(f"stage_adapters.adapters.{branch}.")
        }
        assert all(model.get_parameter(name).grad is not None for name in learning)
        model.zero_grad(set_to_none=True)
    HeadStep(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("scheme", ["sequential", "end_to_end"])
def test_a_run_learns_at_both_stages_and_ships_neither(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe], scheme: str
) -> None:
    how = ("data.train_limit=20", "data.test_limit=10", "train.batch_size=9", "train.epochs=1", "data.val_fraction=0")
    more = (f"method.scheme={scheme}", "method.stages=[2, 3]", "method.stage_weight=0.5", "student.baseline=false")
    run = fit(tiny_recipe(*how, *more, "train.lr=0.001", "teacher.name=vgg8"), root=tmp_path)
    weights = load_tensors(run.weights("assistant" if scheme == "sequential" else "end_to_end"))[0]
    early = {key: value for key, value in weights.items() if key.startswith("stage_adapters")}
    assert [tuple(value.shape[:2]) for key, value in early.items() if key.endswith("conv.weight")] == [
        (512, 24),
        (512, 8),
    ]
    assert all(value.any() for value in early.values())
    fused = load_part(run, "fused")
    assert not any(key.startswith("stage_adapters") for key in fused.state_dict())
    separation = run.read_json("facts.json")["separation"]
    assert count(fused, 8).macs == separation["cost"] <= separation["budget"]
    assert run.read_json("metrics.json")["parts"]["fused"]["parameters"] == count(fused, 8).parameters


@pytest.mark.parametrize(
    ("teacher", "student", "stages", "rule"),
    [
        ("resnet8", "resnet8", [1, 2], "stages 1 to 3, of which 1 to 3 have a partner in resnet8.*and 3 among them"),
        ("resnet8", "resnet8", [2, 9], "stages 1 to 3"),
        ("resnet8", "vgg8", [1, 4], "stages 1 to 4, of which 2 to 4 have a partner"),
    ],
)
def test_stages_that_are_not_there_leave_no_run_behind(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe], teacher: str, student: str, stages: list[int], rule: str
) -> None:
    recipe = tiny_recipe(f"teacher.name={teacher}", f"student.name={student}", f"method.stages={stages}")
    with pytest.raises(RecipeError, match=rule):
        fit(recipe, root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()

"""Runs whose S and A share a trunk: they resume, export at every level, leave early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rkd_deploy.errors import RecipeError
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.trunk import parted
from rkd_deploy.pipeline import export_run
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.residual import AssistantStep, StudentStep, relative
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.weights import load_tensors
from tests.support.adapters import learnt
from tests.train.test_phases import LEAST, runs_and_resumes

TRUNK = ("student.layout=trunk", "student.assistant_share=0.3", "student.round_to=4")


@pytest.mark.parametrize("scheme", ["end_to_end", "sequential"])
def test_a_run_resumes_and_ships(tmp_path: Path, tiny_recipe: Callable[..., Recipe], scheme: str) -> None:
    how = ("method.scheme=end_to_end", "method.stages=[1, 3]", "student.assistants=2", "student.shared_stages=1")
    run = runs_and_resumes(
        tiny_recipe(*LEAST, *TRUNK, "student.baseline=false", *(how if scheme == "end_to_end" else ())), tmp_path
    )
    facts, parts = run.read_json("facts.json"), run.read_json("metrics.json")["parts"]
    assert facts["shared_stages"] == (1 if scheme == "end_to_end" else 2)
    model = load_part(run, "fused")
    assert isinstance(model, ResidualStudent)
    assert model.trunk is not None
    assert (
        count(model, 8).macs == parts["fused"]["macs"] == facts["separation"]["cost"] <= facts["separation"]["budget"]
    )
    for level in ("sum", "tail", "wide", "wide-grouped"):
        assert export_run(run, level=level).proof.parity.passed
    assert export_run(run, part="student").proof.parity.passed
    assert export_run(run, exit_threshold=0.5).proof.parity.passed


def test_a_run_on_a_network_of_timm_inherits_the_trunk_resumes_and_ships(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    half = ("teacher.name=timm:test_resnet", "data.image_size=32", "student.name=teacher", "student.fraction=0.6")
    still = ("train.lr=1e-9", "train.weight_decay=0", "method.scheme=end_to_end", "student.baseline=false")
    run = runs_and_resumes(tiny_recipe(*LEAST, *half, *still, *TRUNK[:2], "student.round_to=8"), tmp_path)
    model = load_part(run, "fused")
    assert isinstance(model, ResidualStudent)
    assert model.trunk is not None
    filters = model.trunk.state_dict()["stages.0.network.conv1.0.weight"]
    source = load_tensors(run.weights("teacher"))[0]["network.conv1.0.weight"]
    assert torch.cdist(filters.flatten(1)[:, :27], source.flatten(1)[:, :27]).min(dim=1).values.max() < 1e-5
    for level in ("tail", "wide"):
        assert export_run(run, level=level).proof.parity.passed
    assert export_run(run, exit_threshold=0.5).proof.parity.passed


def test_the_trunk_learns_with_s_and_stands_still_for_a() -> None:
    T = CifarResNet(8, (4, 4, 6, 9), 4)
    model = parted(CifarResNet(8, (4, 4, 6, 8), None), [CifarResNet(8, (4, 4, 6, 5), None)], 2, 9, 4)
    learnt(model.assistant_adapters[0])
    batch = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    weights = Weights(feature=1.0, assistant=1.0, ce=1.0, student=0.0, step_decay=0.5)
    for step, wanted in (
        (StudentStep(T, model, 1.0), {"trunk", "student", "student_adapter"}),
        (AssistantStep(T, model, 1.0), {"assistants", "assistant_adapters"}),
        (
            EndToEnd(T, model, relative, weights, detach=True, train_head=True),
            {"trunk", "student", "student_adapter", "assistants", "assistant_adapters", "head"},
        ),
    ):
        model.zero_grad(set_to_none=True)
        step.train()(*batch).total.backward()
        assert {
            name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None
        } == wanted
        assert isinstance(model.trunk, nn.Module)
        assert model.trunk.training is ("trunk" in wanted)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("student.shared_stages=1",), 'shared_stages = 1 has no effect .* only with student.layout = "trunk"'),
        (("student.layout=trunk", "method.scheme=progressive"), "exchange their maps"),
    ],
)
def test_what_a_trunk_does_not_do_is_refused(
    tiny_recipe: Callable[..., Recipe], how: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*how)

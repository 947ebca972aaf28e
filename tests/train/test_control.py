"""The control "S0, same losses": what it is, resumes and ships, and what A adds to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rkd_deploy.errors import CheckpointError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.pipeline import export_run
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.fitting import fit
from rkd_deploy.train.networks import load_part, parts_of
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors
from tests.train.test_phases import LEAST, phases, runs_and_resumes

HOW = {
    "end_to_end": (("method.scheme=end_to_end", "method.stages=[2, 3]"), ["control", "end_to_end"]),
    "sequential": (("method.head=trained",), ["control", "control_head", "student", "assistant", "head"]),
}


@pytest.mark.parametrize("scheme", HOW)
def test_the_control_is_s0_by_the_losses_of_s(tmp_path: Path, tiny_recipe: Callable[..., Recipe], scheme: str) -> None:
    how, phases_of_control = HOW[scheme]
    run = runs_and_resumes(tiny_recipe(*LEAST, "student.control=true", *how), tmp_path)
    assert phases(run) == ["teacher", "s0", *phases_of_control]
    metrics = run.read_json("metrics.json")
    assert list(metrics["parts"]) == ["fused", "student", "control", "s0", "teacher"]
    assert metrics["pairs"].keys() == {"s0", "control", "student"}
    for part, pairs in metrics["pairs"].items():
        difference = metrics["parts"]["fused"]["test_top1"] - metrics["parts"][part]["test_top1"]
        assert 100 * (pairs["gained"] - pairs["lost"]) / 10 == pytest.approx(difference)
    control = load_part(run, "control")
    assert isinstance(control, ResidualStudent)
    assert not control.assistants
    s0 = zoo.create("resnet8", 10)
    assert control.student.state_dict().keys() | {"fc.weight", "fc.bias"} == s0.state_dict().keys()
    assert metrics["parts"]["control"]["macs"] == count(s0, 8).macs + 64 * 64 * 2 * 2  # its adapter: folded at export
    teacher = load_tensors(run.weights("teacher"))[0]["fc.weight"]
    assert not torch.equal(control.head.get_parameter("weight"), teacher)  # it has learnt along, or is a fresh one
    assert export_run(run, part="control").proof.parity.passed


def test_a_run_of_before_has_none(tmp_path: Path, tiny_run: Run) -> None:
    text = (tiny_run.folder / "recipe.toml").read_text()
    assert "control = false" in text
    (tmp_path / "recipe.toml").write_text(text.replace("control = false\n", ""))
    assert "control" in parts_of(Run(tmp_path).recipe)  # a recipe of today
    (tmp_path / "facts.json").write_text("{}")
    assert "control" not in parts_of(Run(tmp_path).recipe)
    with pytest.raises(CheckpointError, match=r"'control'\. It was left out by the recipe"):
        load_part(tiny_run, "control")


def test_no_control_where_s0_is_left_out_or_stages_exchange_maps(tiny_recipe: Callable[..., Recipe]) -> None:
    for how in ("student.baseline=false", "method.scheme=progressive", "method.name=kd"):
        assert "control" not in parts_of(tiny_recipe("student.control=true", how))


def test_the_control_inherits_s0_whole(tmp_path: Path, tiny_recipe: Callable[..., Recipe], pth: Path) -> None:
    """At a rate of nothing it is still the given S0."""
    how = (*LEAST, "student.control=true", f"student.checkpoint={pth}", "train.lr=1e-9", f"teacher.checkpoint={pth}")
    run = fit(tiny_recipe(*how), root=tmp_path)
    s0, control = torch.load(pth, weights_only=True), load_part(run, "control")
    torch.testing.assert_close(control.student.conv1.weight, s0["conv1.weight"], rtol=0, atol=1e-5)  # type: ignore[union-attr]

"""Every scheme, head, base loss and baseline runs, resumes in the same bits, and ships."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rkd_deploy.errors import CheckpointError, InterruptedTraining, RecipeError, UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import NetworkCost, count
from rkd_deploy.models.residual import Adapter
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.pipeline import export_run
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import evaluation, preparation
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import read_log
from rkd_deploy.train.methods.simkd import ReusedClassifier
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.runs import Run, newest_run
from rkd_deploy.train.weights import load_tensors

MakeRecipe = Callable[..., Recipe]
# Two steps in a phase: one before an interruption and one after.
LEAST = (
    "data.train_limit=20",
    "data.test_limit=10",
    "train.batch_size=9",
    "train.epochs=1",
    "data.val_fraction=0",
    "train.lr=0.005",
)
LOSSES = ("kd", "fitnet", "at", "dkd", "reviewkd", "simkd")
BUDGET = ("student.round_to=1", "student.assistant_share=0.3")


@pytest.fixture(autouse=True, scope="module")
def costs_are_remembered() -> Iterator[None]:
    """The same few networks over and over: their widths are searched for, and their costs counted, once."""
    known: dict[tuple[Any, ...], NetworkCost] = {}

    def counted(module: nn.Module, size: tuple[int, int]) -> NetworkCost:
        key = (size, *((name, tuple(value.shape)) for name, value in module.named_parameters()))
        known[key] = known.get(key) or count(module, size)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "separate", functools.cache(separate))
        patch.setattr(evaluation, "count", counted)
        yield


class StopAt(Silent):
    """Asks training to stop after so many steps; in the evaluation after it, the signal would end the process."""

    def __init__(self, step_number: int) -> None:
        self.left = step_number

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        if name == "test":
            self.left = 0

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def outcome(run: Run) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)]
    weights = {path.name: path.read_bytes() for path in (run.folder / "weights").iterdir()}
    return {"rows": rows, "parts": run.read_json("metrics.json")["parts"], **weights}


def runs_and_resumes(recipe: Recipe, root: Path) -> Run:
    """Whole, and stopped in every phase: the same bits."""
    whole = fit(recipe, root=root / "whole")
    assert all(
        torch.isfinite(tensor).all() for path in (whole.folder / "weights").iterdir() for tensor in tensors(path)
    )
    run: Run | None = None
    while run is None or not run.finished:
        try:
            run = fit(recipe, root=root / "b", display=StopAt(1)) if run is None else resume(run, display=StopAt(2))
        except InterruptedTraining:
            run = newest_run(root / "b", finished=False)
    ours, theirs = outcome(run), outcome(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    return whole


def tensors(path: Path) -> list[torch.Tensor]:
    return [tensor for tensor in load_tensors(path)[0].values() if tensor.is_floating_point()]


def phases(run: Run) -> list[str]:
    return list(run.read_json("metrics.json")["phases"])


SCHEMES = {
    "sequential": ["student", "assistant"],
    "progressive": [f"{stage}{name}" for stage in ("stage_1_", "stage_2_", "") for name in ("student", "assistant")],
    "end_to_end": ["end_to_end"],
}
COMBINATIONS = [
    (scheme, base)
    for scheme in SCHEMES
    for base in ("none", *LOSSES)
    if scheme != "progressive" or base not in ("fitnet", "reviewkd")  # refused: they mix stages
]


# Another head is another phase, or another part of the last one, whatever the base loss; SimKD reuses a head itself.
WITH_HEADS = [(*combination, "teacher") for combination in COMBINATIONS] + [
    (*combination, head)
    for combination in COMBINATIONS
    if combination[1] in ("none", "simkd")
    for head in ("trained", "finetuned")
]


@pytest.mark.parametrize(("scheme", "base", "head"), WITH_HEADS)
def test_every_scheme_head_and_base(tmp_path: Path, tiny_recipe: MakeRecipe, scheme: str, base: str, head: str) -> None:
    control = head == "teacher"  # it does not depend on the head: once is enough
    how = (f"method.scheme={scheme}", f"method.base={base}", f"method.head={head}")
    run = runs_and_resumes(tiny_recipe(*LEAST, *how, f"student.baseline={str(control).lower()}"), tmp_path)
    phases_of_scheme = SCHEMES[scheme] + ["head"] * (head != "teacher" and scheme != "end_to_end")
    assert phases(run) == ["teacher", *["s0"] * control, *phases_of_scheme]
    assert list(run.read_json("metrics.json")["parts"]) == ["fused", "student", *["s0"] * control, "teacher"]
    logged = {row["phase"]: row for row in read_log(run.log.path)}
    taught = {name for name in phases_of_scheme if "base" in logged[name]}
    students = {name for name in phases_of_scheme if name.endswith(("student", "end_to_end"))}
    if scheme == "progressive" and base != "at":  # what reads logits or the last map comes in with the last stage
        students = {"student"}
    assert taught == (set() if base == "none" else students)
    weights, teacher = (load_tensors(run.weights(name))[0] for name in (phases_of_scheme[-1], "teacher"))
    assert torch.equal(weights["head.weight"], teacher["fc.weight"]) is (head == "teacher")
    assert not any(key.startswith(("base", "teacher", "loss")) for key in weights)  # adapters of the loss do not ship
    if control:  # taught by the same loss, with a head of its own, and with nothing else that ships
        assert ("base" in logged["s0"]) is (base != "none")
        assert "ce" in logged["s0"]
        s0 = load_tensors(run.weights("s0"))[0]
        assert s0.keys() == teacher.keys()  # both are ResNet-8
        assert not torch.equal(s0["fc.weight"], teacher["fc.weight"])
    if head == "finetuned":  # one step away from T's head, where a fresh one is far
        assert (weights["head.weight"] - teacher["fc.weight"]).abs().max() < 0.1


@pytest.mark.parametrize("scheme", ["sequential", "end_to_end"])
@pytest.mark.parametrize("k", [2, 3])
def test_a_chain(tmp_path: Path, tiny_recipe: MakeRecipe, scheme: str, k: int) -> None:
    how = (*LEAST, *BUDGET, f"student.assistants={k}", f"method.scheme={scheme}", "student.baseline=false")
    run = runs_and_resumes(tiny_recipe(*how), tmp_path)
    chain = ["assistant", "assistant_2", "assistant_3"][:k]
    assert phases(run) == ["teacher", *(["end_to_end"] if scheme == "end_to_end" else ["student", *chain])]
    model = load_part(run, "fused")
    assert len(model.assistants) == k
    assert all(adapter.norm.weight.any() for adapter in model.assistant_adapters)
    separation, parts = run.read_json("facts.json")["separation"], run.read_json("metrics.json")["parts"]
    assert count(model, 8).macs == parts["fused"]["macs"] == separation["cost"] <= separation["budget"]
    assert export_run(run).proof.parity.passed


@pytest.mark.parametrize("name", ["cross_entropy", *LOSSES])
def test_every_baseline_runs_resumes_and_ships(tmp_path: Path, tiny_recipe: MakeRecipe, name: str) -> None:
    run = runs_and_resumes(tiny_recipe(*LEAST, f"method.name={name}"), tmp_path)
    teacher = [] if name == "cross_entropy" else ["teacher"]
    assert phases(run) == [*teacher, "s0"]
    parts = run.read_json("metrics.json")["parts"]
    assert list(parts) == ["s0", *teacher]
    s0 = load_part(run, "s0")
    full = count(zoo.create("resnet8", 10), 8).macs
    assert (parts["s0"]["macs"] > full) is isinstance(s0, ReusedClassifier) is (name == "simkd")  # its projector ships
    exported = export_run(run)
    assert exported.folder.name == "bundle-s0"
    assert exported.proof.parity.passed
    for part in ("fused", "student"):
        with pytest.raises(
            CheckpointError, match=rf"no weights of phase '{part}'. It was left out by the recipe, which"
        ):
            load_part(run, part)
    with pytest.raises(UsageError, match="Unknown part 'fusd'"):
        load_part(run, "fusd")


def test_a_reused_head_is_the_teachers(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    run = fit(tiny_recipe(*LEAST, "method.name=simkd"), root=tmp_path)
    s0, teacher = (load_tensors(run.weights(name))[0] for name in ("s0", "teacher"))
    assert torch.equal(s0["fc.weight"], teacher["fc.weight"])


@pytest.mark.parametrize("distance", ["mse", "normalised_mse", "smooth_l1", "cosine"])
def test_every_distance_trains_s_and_a(tmp_path: Path, tiny_recipe: MakeRecipe, distance: str) -> None:
    run = fit(tiny_recipe(*LEAST, "student.baseline=false", f"method.distance={distance}"), root=tmp_path)
    student, assistant = (load_tensors(run.weights(name))[0] for name in ("student", "assistant"))
    key = "assistant_adapters.0.norm.weight"
    assert assistant[key].isfinite().all()
    assert assistant[key].any()
    assert not student[key].any()


def test_a_stage_that_t_and_s_lack_leaves_no_run_behind(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"method\.hint_stage = 9; T and S both have stages 1 to 3"):
        fit(tiny_recipe(*LEAST, "method.name=fitnet", "method.hint_stage=9"), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_same_recipe_without_a_base_loss_gives_another_student_and_another_control(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    """The judge of the matrix above can say no: a base loss does change S and S0, and nothing before them."""
    plain, with_at = (fit(tiny_recipe(*LEAST, f"method.base={base}"), root=tmp_path) for base in ("none", "at"))
    changed = {key for key, value in outcome(plain).items() if outcome(with_at)[key] != value}
    assert changed >= {"s0.safetensors", "student.safetensors", "rows"}
    assert "teacher.safetensors" not in changed


@pytest.mark.parametrize("base", ["fitnet", "reviewkd"])
def test_progressive_refuses_a_loss_that_mixes_stages(tiny_recipe: MakeRecipe, base: str) -> None:
    with pytest.raises(RecipeError, match=rf'method\.base = "{base}" mixes maps of several stages'):
        tiny_recipe("method.scheme=progressive", f"method.base={base}")


def test_progressive_refuses_a_network_that_is_not_ours(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(*LEAST, "method.scheme=progressive", "student.name=timm:test_resnet", "data.image_size=32")
    with pytest.raises(RecipeError, match=r"needs an S0 of a built-in family, and timm:test_resnet is none"):
        fit(recipe, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_progressive_keeps_the_budget_with_all_its_adapters_and_ships(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    how = (*LEAST, *BUDGET, "method.scheme=progressive", "student.assistants=2", "student.baseline=false")
    run = fit(tiny_recipe(*how, "teacher.name=wrn_16_1"), root=tmp_path)
    stages = ("stage_1_", "stage_2_", "")
    names = [f"{stage}{name}" for stage in stages for name in ("student", "assistant", "assistant_2")]
    assert phases(run) == ["teacher", *names]
    rows = {row["phase"]: row for row in read_log(run.log.path)}
    assert [name for name in names if "train_top1" in rows[name]] == names[-3:]  # logits come with the last stage
    facts, parts = run.read_json("facts.json"), run.read_json("metrics.json")["parts"]
    assert facts["stage_channels"] == [16, 32, 64]
    separation, model, alone = facts["separation"], load_part(run, "fused"), load_part(run, "student")
    assert count(model, 8).macs == parts["fused"]["macs"] == separation["cost"] <= separation["budget"]
    assert count(alone, 8).macs == parts["student"]["macs"] < parts["fused"]["macs"]
    for level in ("sum", "tail"):
        assert export_run(run, level=level).proof.parity.passed
    assert export_run(run, part="student").proof.parity.passed


@pytest.mark.parametrize("scheme", ["sequential", "end_to_end"])
def test_several_stages_resume_in_the_same_bits(tmp_path: Path, tiny_recipe: MakeRecipe, scheme: str) -> None:
    """The adapters of earlier stages are no part of what ships, and are part of what resumes."""
    how = (*LEAST, f"method.scheme={scheme}", "method.stages=[1, 3]", "student.baseline=false")
    run = runs_and_resumes(tiny_recipe(*how), tmp_path)
    plain = fit(tiny_recipe(*LEAST, f"method.scheme={scheme}", "student.baseline=false"), root=tmp_path / "plain")
    last = {"sequential": "assistant", "end_to_end": "end_to_end"}[scheme]
    several, last_alone = (load_tensors(each.weights(last))[0] for each in (run, plain))
    assert several.keys() - last_alone.keys() == {
        f"stage_adapters.adapters.{b}.0.{k}" for b in (0, 1) for k in Adapter(1, 1).state_dict()
    }
    assert not torch.equal(several["student.layer1.0.conv1.weight"], last_alone["student.layer1.0.conv1.weight"])

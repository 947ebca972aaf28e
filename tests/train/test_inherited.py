"""S0 as a fraction of T, and inherited weights: within budget, in the same bits again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preparing import facts_of

from rkd_deploy.errors import InterruptedTraining
from rkd_deploy.models.cost import count
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.networks import build_s0, build_teacher, load_part
from rkd_deploy.train.runs import Run, newest_run
from rkd_deploy.train.weights import load_tensors

MakeRecipe = Callable[..., Recipe]
HALF = ("student.name=teacher", "student.fraction=0.5", "student.assistant_share=0.3")
QUICK = ("train.epochs=1", "train.lr=0.005", "data.train_limit=20", "data.test_limit=10", "train.batch_size=9")
EXTERNAL = ("teacher.name=timm:test_resnet", "data.image_size=32", "data.val_fraction=0", *HALF, *QUICK)


class StopIn(Silent):
    """Asks training to stop in the second step of a phase."""

    def __init__(self, name: str) -> None:
        self.name, self.left = name, 0

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.left = 2 if name == self.name else 0

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "weights").glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, external: Recipe) -> Run:
    return fit(external, root=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def external(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe(*EXTERNAL)


@pytest.mark.parametrize("phase", ["s0", "student", "assistant"])
def test_a_run_that_inherits_resumes_in_the_same_bits(phase: str, whole: Run, external: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InterruptedTraining):
        fit(external, root=tmp_path, display=StopIn(phase))
    stopped = newest_run(tmp_path, finished=False)
    assert f"{phase}.safetensors" not in weights(stopped)
    again = resume(stopped)
    ours, theirs = weights(again), weights(whole)
    assert {"teacher.safetensors", "s0.safetensors", "student.safetensors", "assistant.safetensors"} <= ours.keys()
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []
    assert again.read_json("metrics.json")["parts"] == whole.read_json("metrics.json")["parts"]


def test_a_run_that_begins_at_random_ends_elsewhere(whole: Run, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The judge above can say no: what is inherited is seen in the weights, and the teacher's do not depend on it."""
    fresh = fit(tiny_recipe(*EXTERNAL, "student.weights=fresh"), root=tmp_path)
    ours, theirs = weights(fresh), weights(whole)
    assert {name for name in theirs if ours.get(name) != theirs[name]} >= {"s0.safetensors", "student.safetensors"}


REBUILD = """
import sys
from pathlib import Path
import torch
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.runs import Run
folder, into = sys.argv[1:]
torch.set_num_threads(1)
x_NCHW = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
with torch.no_grad():
    torch.save({part: load_part(Run(Path(folder)), part)(x_NCHW) for part in ("fused", "student", "s0")}, into)
"""


def test_a_later_process_rebuilds_the_same_networks(whole: Run, tmp_path: Path) -> None:
    """The widths of pruned layers mean nothing but by their order: it must not depend on the process."""
    x_NCHW = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = {part: load_part(whole, part)(x_NCHW) for part in ("fused", "student", "s0")}
    command = [sys.executable, "-c", REBUILD, str(whole.folder), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "4711"}, timeout=300)
    stored = torch.load(tmp_path / "logits.pt")
    assert stored.keys() == expected.keys()
    for part, logits in expected.items():
        assert logits.std() > 0
        assert torch.equal(stored[part], logits), part


def test_s_and_a_begin_with_the_teachers_channels(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Every filter of their first layer is one of T's: S has the strongest, A goes on where S ends."""
    still = ("train.lr=1e-9", "train.weight_decay=0", "data.val_fraction=0", "method.head=teacher")
    run = fit(tiny_recipe("teacher.name=resnet8", *HALF, *QUICK, *still, "student.round_to=4"), root=tmp_path)
    source = load_tensors(run.weights("teacher"))[0]["conv1.weight"]
    state = load_tensors(run.weights("assistant"))[0]
    student, assistant = (state[f"{name}.conv1.weight"] for name in ("student", "assistants.0"))
    whose = [torch.cdist(filters.flatten(1), source.flatten(1)).min(dim=1) for filters in (student, assistant)]
    assert max(float(nearest.values.max()) for nearest in whose) < 1e-5
    S, A = (nearest.indices.tolist() for nearest in whose)
    assert sorted(S) == S  # in T's order
    assert len(S) + len(A) > 16 or not set(S) & set(A)
    assert set(S) | set(A) > set(S)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.3, 0.7])
@pytest.mark.parametrize("name", ["resnet20", "timm:test_resnet", "tv:mobilenet_v3_small"])
def test_a_fraction_of_the_teacher_is_used_and_not_exceeded(
    name: str, fraction: float, unit: str, tiny_recipe: MakeRecipe
) -> None:
    keys = (f"student.fraction={fraction}", f"student.budget={unit}", "student.name=teacher", "method.name=kd")
    recipe = tiny_recipe(f"teacher.name={name}", *keys, "data.image_size=32", "student.round_to=4")
    facts = facts_of(recipe)
    T = build_teacher(recipe, 10, (32, 32))
    costs: list[Any] = [count(network, 32) for network in (build_s0(recipe, facts), T)]
    s0, teacher = (cost.macs if unit == "macs" else cost.parameters for cost in costs)
    assert s0 / teacher <= fraction
    if fraction > 0.65 and (name, unit) == ("tv:mobilenet_v3_small", "params"):  # 0.61 of T's lie before its own head
        assert facts.given_widths == narrowable(T, (32, 32)).widths
    else:
        assert s0 / teacher >= 0.9 * fraction

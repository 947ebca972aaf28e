"""A run that was interrupted, however and whenever, ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rkd_deploy.errors import InterruptedTraining, UsageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.log import RunLog, read_log
from rkd_deploy.train.runs import Run, newest_run

MakeRecipe = Callable[..., Recipe]
QUICK = ("data.train_limit=40", "data.test_limit=20", "train.batch_size=12")


def outcome(run: Run) -> dict[str, Any]:
    """Everything that must not depend on when a run was interrupted."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)]
    files = {path.name: path.read_bytes() for path in (run.folder / "weights").glob("*.safetensors")}
    assert len(files) >= 4
    assert len(rows) >= 4
    return {
        **files,
        "log": rows,
        "parts": run.read_json("metrics.json")["parts"],
        "facts": (run.folder / "facts.json").read_bytes(),
        "recipe": (run.folder / "recipe.toml").read_bytes(),
        "files": sorted(path.name for path in run.folder.iterdir() if path.suffix != ".tmp"),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]


def test_another_learning_rate_in_its_sixth_digit_is_seen(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """The judge of all tests here can say no, also where the change is the smallest."""
    rates = ("0.05", "0.050001")
    runs = [fit(tiny_recipe(*QUICK, "train.epochs=1", f"train.lr={lr}"), root=tmp_path / lr) for lr in rates]
    different = differences(*(outcome(run) for run in runs))
    assert {"teacher.safetensors", "s0.safetensors", "student.safetensors", "assistant.safetensors", "log"} <= {
        *different
    }


# In this process, at every point there is


class Stopper(Silent):
    """Sends this process a signal in the step after `left` others."""

    def __init__(self, left: int, number: signal.Signals) -> None:
        self.left, self.number = left, number

    def step(self) -> None:
        self.left -= 1
        if self.left == -1:  # once: a second signal acts as usual
            os.kill(os.getpid(), self.number)


@pytest.fixture
def harmless_signals() -> Iterator[None]:
    """A signal that comes outside of training must not end the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def losses(run: Run) -> list[float]:
    """The training loss of every epoch of every phase."""
    return [row["loss"] for row in read_log(run.log.path) if "loss" in row]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("harmless_signals")
def test_on_a_gpu_a_resumed_run_is_as_near_as_a_second_run(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """Sums on a GPU come in no fixed order, so two runs differ; another seed differs by far more."""
    recipe = tiny_recipe(*QUICK, "train.device=cuda", "train.epochs=3")
    first, second = (losses(fit(recipe, root=tmp_path / name)) for name in ("first", "second"))
    other = losses(fit(tiny_recipe(*QUICK, "train.device=cuda", "train.epochs=3", "train.seed=1"), root=tmp_path / "o"))
    with pytest.raises(InterruptedTraining):
        fit(recipe, root=tmp_path / "stopped", display=Stopper(9, signal.SIGTERM))
    stopped = newest_run(tmp_path / "stopped", finished=False)
    resumed = losses(resume(stopped))
    noise = max(abs(a - b) for a, b in zip(first, second, strict=True))
    farthest = max(abs(a - b) for a, b in zip(first, resumed, strict=True))
    assert farthest <= max(10 * noise, 1e-3)
    assert max(abs(a - b) for a, b in zip(first, other, strict=True)) > 10 * max(noise, 1e-3)


@pytest.mark.usefixtures("harmless_signals")
@pytest.mark.parametrize("head", ["teacher", "trained"])
def test_stopped_at_every_single_step(tmp_path: Path, tiny_recipe: MakeRecipe, head: str) -> None:
    control = str(head == "teacher").lower()  # of S0, once is enough
    recipe = tiny_recipe(*QUICK, f"method.head={head}", f"student.baseline={control}")
    whole = fit(recipe, root=tmp_path / "whole")
    stops, run = 0, None
    while run is None or not run.finished:
        display = Stopper(0, (signal.SIGTERM, signal.SIGINT)[stops % 2])
        try:
            run = (
                fit(recipe, root=tmp_path / "stopped", display=display) if run is None else resume(run, display=display)
            )
        except InterruptedTraining:
            stops += 1
            assert stops < 100
            run = newest_run(tmp_path / "stopped", finished=False)
    assert stops == 4 * 2 * (36 // 12)  # phases, epochs and steps in each
    assert differences(outcome(run), outcome(whole)) == []


class Crash(BaseException):
    """Stands for a kill: nothing in the package catches it."""


class Crashes:
    """Crashes once at every moment of every durable write: each attempt gets one moment further."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: set[tuple[str | int, ...]] = set()
        replace, append = Path.replace, RunLog.append

        def replacing(path: Path, target: Path) -> Path:
            self.moment("before", target.name)
            moved = replace(path, target)
            self.moment("after", target.name)
            return moved

        def appending(log: RunLog, event: str, **facts: Any) -> None:
            name = f"log {facts['phase']} {facts['epoch']}"
            self.moment("before", name)
            if ("within", name) not in self.done:
                self.done.add(("within", name))
                with log.path.open("a") as stream:
                    stream.write(json.dumps({"event": event, **facts})[:40])
                raise Crash
            append(log, event, **facts)
            self.moment("after", name)

        patch.setattr(Path, "replace", replacing)
        patch.setattr(RunLog, "append", appending)

    def moment(self, when: str, name: str) -> None:
        """A checkpoint is written many times under one name: the lines of the log tell which time it is."""
        key = (when, name, self.progress())
        if key not in self.done:
            self.done.add(key)
            raise Crash

    progress: Callable[[], int] = staticmethod(lambda: 0)


def test_killed_before_within_and_after_every_write(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    how = ("method.head=trained", "student.baseline=false", "data.train_limit=20", "train.batch_size=9")
    recipe = tiny_recipe(*QUICK, *how)
    whole = fit(recipe, root=tmp_path / "whole")
    root = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        crashes = Crashes(patch)
        crashes.progress = lambda: "".join(path.read_text() for path in root.glob("*/log.jsonl")).count("\n")
        run = None
        while run is None:
            begun = [Run(path.parent) for path in root.glob("*/recipe.toml")]
            try:
                run = resume(begun[0]) if begun else fit(recipe, root=root)
            except Crash:
                assert len(crashes.done) < 100  # else the log grows with each attempt, and another moment with it
    phases, epochs = 4, 2
    writes = 4 + phases + phases * epochs  # recipe, environment, facts, metrics; weights; checkpoints
    assert len(crashes.done) >= 2 * writes + 3 * phases * epochs  # and within each line of the log
    run = newest_run(root, finished=True)
    assert differences(outcome(run), outcome(whole)) == []


def test_killed_when_the_last_weights_are_written_it_has_its_curves(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """A phase that has its weights is not entered again: nothing that belongs to it may come after them."""
    recipe = tiny_recipe(*QUICK, "method.name=cross_entropy", "train.curves=true")
    replace = Path.replace

    def crashing(path: Path, target: Path) -> Path:
        replace(path, target)
        if target.name == "s0.safetensors":
            raise Crash
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        with pytest.raises(Crash):
            fit(recipe, root=tmp_path)
    run = resume(newest_run(tmp_path, finished=False))
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


# Real processes, really killed


class Nursery:
    """Speaks to the script of that name."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "support/nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def train(
        self, recipe: Recipe, root: Path, number: signal.Signals | None = None, after: float = 0
    ) -> tuple[int, float]:
        """Let a child train and send it a signal so many seconds after its first phase began.

        Returns:
            Its exit code, negative for a signal, and for how many seconds it trained.
        """
        assert self.process.stdin is not None
        task = {"root": str(root), "recipe": recipe.to_toml(), "signal": number, "after": after}
        print(json.dumps(task), file=self.process.stdin, flush=True)
        code, seconds = json.loads(self.answer())
        return code, seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One for all tests here: it takes seconds to start."""
    runs = Nursery()
    yield runs
    runs.close()


@pytest.mark.parametrize(
    ("number", "head"),
    [(signal.SIGTERM, "teacher"), (signal.SIGKILL, "teacher"), (signal.SIGKILL, "trained")],
    ids=lambda value: getattr(value, "name", value),
)
def test_killed_at_random_moments(
    tmp_path: Path, tiny_recipe: MakeRecipe, nursery: Nursery, number: signal.Signals, head: str
) -> None:
    recipe = tiny_recipe(f"method.head={head}")
    code, seconds = nursery.train(recipe, tmp_path / "whole")
    assert code == 0
    chance, exits, interrupted = random.Random(f"{number} {head}"), [code], 0
    while exits[-1] != 0 or len(exits) == 1:
        # A wait that is too short for an epoch each time would never end: after some kills it is left to finish.
        left_alone = len(exits) > 5
        code, _ = nursery.train(
            recipe, tmp_path / "killed", None if left_alone else number, chance.uniform(0, 0.3 * seconds)
        )
        exits.append(code)
        interrupted += code != 0 and bool(list((tmp_path / "killed").glob("*/checkpoint.safetensors")))
    # A second signal, or one after the last phase, acts as usual.
    assert {*exits} <= ({0, 130, -signal.SIGTERM} if number == signal.SIGTERM else {0, -signal.SIGKILL})
    assert interrupted >= 2
    runs = [newest_run(tmp_path / name, finished=True) for name in ("killed", "whole")]
    assert differences(*(outcome(run) for run in runs)) == []


def test_two_processes_do_not_go_on_with_one_run(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """Each would log every epoch, and write its checkpoint over the other's."""

    class ResumesToo(Silent):
        refusals = 0

        def epoch(self, row: dict[str, Any]) -> None:
            (folder,) = tmp_path.iterdir()
            with pytest.raises(UsageError, match="is being trained by another process"):
                resume(Run(folder))
            self.refusals += 1

    display = ResumesToo()
    run = fit(tiny_recipe("method.name=cross_entropy", "data.train_limit=40"), root=tmp_path, display=display)
    assert display.refusals == 2
    assert [row["epoch"] for row in read_log(run.log.path)] == [1, 2]
    assert resume(Run(run.folder)).finished  # the lock is given back

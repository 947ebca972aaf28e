"""`fit`: everything a recipe asks for, phase after phase, into one run folder.

    teacher    T by cross-entropy, where the recipe gives no checkpoint
    s0         S0 by cross-entropy: the control at the same cost
    student    S imitates T's map
    assistant  A learns what S leaves over
    head       a fresh head, where the recipe asks for one

A phase whose weights are in the run folder is done and is loaded; the first one that is not goes on from the
checkpoint. The test images are used once, at the end.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import ImageSet, Split, load_images, on_device
from rkd_deploy.errors import DataError, RecipeError
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import Staged
from rkd_deploy.recipe import Recipe
from rkd_deploy.serve.bench.accuracy import top1
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.storage import write_json
from rkd_deploy.train import networks
from rkd_deploy.train.checkpoint import load_tensors, load_weights, save_tensors
from rkd_deploy.train.evaluation import predictions
from rkd_deploy.train.interruption import StopRequest
from rkd_deploy.train.loop import Display, Phase, train_phase
from rkd_deploy.train.methods.base import Method
from rkd_deploy.train.methods.cross_entropy import CrossEntropy
from rkd_deploy.train.methods.residual import AssistantStep, HeadStep, StudentStep
from rkd_deploy.train.progress import Silent
from rkd_deploy.train.runlog import read_log
from rkd_deploy.train.runs import DEFAULT_ROOT, Run, create_run


def fit(recipe: Recipe, *, root: Path = DEFAULT_ROOT, display: Display | None = None) -> Run:
    """Train what a recipe asks for.

    Args:
        recipe: See `rkd_deploy.recipe`.
        root: The run folder is made in here.
        display: Shown to a person; default: nothing.

    Returns:
        The finished run.

    Raises:
        RkdError: What is wrong with the recipe, the data or a checkpoint; found before a run folder is made, where
            that can be.
    """
    device = _device(recipe.train.device)
    images = load_images(recipe.data, recipe.train.seed)
    facts = networks.gather_facts(recipe, images)
    trainer = _Trainer(recipe, facts, images, device)  # loads the given weights, so that bad ones leave no run behind
    run = create_run(root, recipe)
    write_json(run.folder / "environment.json", provenance())
    write_json(run.folder / "facts.json", facts)
    return trainer.run(run, display or Silent())


def resume(run: Run, *, display: Display | None = None) -> Run:
    """Go on with an unfinished run where its checkpoint stands; a finished one is given back as it is."""
    if run.finished:
        return run
    recipe = run.recipe
    images = load_images(recipe.data, recipe.train.seed)
    if not (run.folder / "facts.json").exists():  # killed in its first moments
        write_json(run.folder / "environment.json", provenance())
        write_json(run.folder / "facts.json", networks.gather_facts(recipe, images))
    facts = run.read_json("facts.json")
    return _Trainer(recipe, facts, images, _device(recipe.train.device)).run(run, display or Silent())


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A phase that is yet to be built: building it freezes and unfreezes, so it waits for its turn."""

    name: str
    product: nn.Module
    epochs: int
    method: Callable[[], Method]


class _Trainer:
    """Holds the networks and the data of one `fit`."""

    def __init__(self, recipe: Recipe, facts: dict[str, Any], images: ImageSet, device: torch.device) -> None:
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.recipe, self.facts, self.device = recipe, facts, device
        self.normalise = Normaliser(images.mean, images.std, device)
        self.train, self.val, self.test = (
            on_device(split, device) for split in (images.train, images.val, images.test)
        )
        self.teacher = networks.build_teacher(recipe, facts).to(device)
        self.given: Staged | None = networks.build_given(recipe, facts).to(device) if recipe.student.baseline else None
        self.model: ResidualStudent = networks.build_residual(recipe, facts).to(device)
        self.ready: set[str] = set()
        self._load_given_weights()

    def run(self, run: Run, display: Display) -> Run:
        """Every phase that is not done yet, then the evaluation."""
        for name in sorted(self.ready):
            if not run.weights(name).exists():
                self._keep(run, name, self.teacher if name == "teacher" else self._s0())
        with StopRequest() as stop:
            for plan in self._plans():
                self._phase(plan, run, display, stop)
        run.checkpoint.unlink(missing_ok=True)  # before the run counts as finished: a kill in between leaves no rest
        write_json(run.metrics_path, self._metrics(run))
        return run

    def _plans(self) -> Iterator[_Plan]:
        recipe, model, teacher = self.recipe, self.model, self.teacher
        epochs = recipe.train.epochs
        if "teacher" not in self.ready:
            yield _Plan("teacher", teacher, recipe.teacher.epochs or epochs, lambda: CrossEntropy(teacher))
        if self.given is not None and "s0" not in self.ready:
            yield _Plan("s0", self.given, epochs, lambda: CrossEntropy(self._s0()))
        yield _Plan("student", model, epochs, self._student_step)
        yield _Plan("assistant", model, recipe.train.assistant_epochs or epochs, self._assistant_step)
        if recipe.method.head == "trained":
            yield _Plan("head", model, recipe.train.head_epochs or epochs, self._head_step)

    def _phase(self, plan: _Plan, run: Run, display: Display, stop: StopRequest) -> None:
        path = run.weights(plan.name)
        if path.exists():
            state, _ = load_tensors(path)
            load_weights(plan.product, state, str(path), plan.name)
            return
        torch.manual_seed(networks.derived_seed(self.recipe.train.seed, plan.name))
        phase = Phase(plan.name, plan.method(), plan.product, plan.epochs, self._val_top1)
        loader = DeviceLoader(
            self.train,
            self.normalise,
            batch_size=self.recipe.train.batch_size,
            augmentations=self.recipe.data.augment,
            crop_padding=self.recipe.data.crop_padding,
            seed=networks.derived_seed(self.recipe.train.seed, plan.name),
        )
        train_phase(phase, loader, self.recipe.train, run, display, stop)
        self._keep(run, plan.name, plan.product)

    def _student_step(self) -> Method:
        # Reused as it is, or until a head of its own is trained: S's progress can be read as an accuracy either way.
        assert self.teacher.fc is not None
        self.model.head.load_state_dict(self.teacher.fc.state_dict())
        return StudentStep(self.teacher, self.model, self.recipe.method.feature_weight)

    def _assistant_step(self) -> Method:
        return AssistantStep(self.teacher, self.model, self.recipe.method.feature_weight)

    def _head_step(self) -> Method:
        with networks.seeded(self.recipe.train.seed, "init/head"):
            self.model.head.reset_parameters()
        return HeadStep(self.model)

    def _s0(self) -> Staged:
        assert self.given is not None
        return self.given

    def _load_given_weights(self) -> None:
        recipe = self.recipe
        if recipe.student.checkpoint is not None and self.given is None:
            raise RecipeError("student.checkpoint is set and student.baseline is false: set one of them otherwise.")
        for table, part, module in (("teacher", "teacher", self.teacher), ("student", "s0", self.given)):
            checkpoint = getattr(recipe, table).checkpoint
            if checkpoint is None or module is None:
                continue
            known = networks.load_given_weights(module, table, checkpoint, recipe, self.facts)
            self.ready.add(part)
            self._check_sanity(module, table, checkpoint, known)

    def _check_sanity(self, module: Staged, table: str, checkpoint: str, known: bool) -> None:
        """A network that guesses on its own data is fed wrongly: say so now, not after hours of imitating it."""
        seen = self.val or self.train
        seen = seen.take(torch.arange(min(1000, len(seen))))
        accuracy = self._top1(module, seen)
        chance = 100 / len(self.facts["classes"])
        if accuracy < 3 * chance:
            normalisation = (
                "" if known else f"; its normalisation is not recorded, the data's is mean {self.facts['mean']}"
            )
            raise DataError(
                f"{table} {checkpoint} classifies {accuracy:.1f} % of {len(seen)} training images right, chance is "
                f"{chance:.1f} %: it was trained on other classes, another order of them, or another normalisation"
                f"{normalisation}. State the right ones in [data]: mean, std, name."
            )

    def _val_top1(self, module: nn.Module) -> float | None:
        if not len(self.val):
            return None
        return self._top1(module, self.val)

    def _top1(self, module: nn.Module, split: Split) -> float:
        return top1(predictions(module, split, self.normalise).numpy(), split.labels_N.cpu().numpy())

    def _keep(self, run: Run, name: str, module: nn.Module) -> None:
        own = {key: self.facts[key] for key in ("classes", "mean", "std")}
        save_tensors(run.weights(name), module.state_dict(), {"network": name, **own})

    def _metrics(self, run: Run) -> dict[str, Any]:
        began = time.perf_counter()
        parts = {}
        for part in networks.PARTS:
            if part == "s0" and self.given is None:
                continue
            module = networks.load_part(run, part).to(self.device)
            cost = count(module, tuple(self.facts["image_size"]))
            parts[part] = {
                "test_top1": self._top1(module, self.test),
                "test_images": len(self.test),
                "parameters": cost.parameters,
                "macs": cost.macs,
                "unsupported_operators": list(cost.unsupported),
            }
        return {"parts": parts, "phases": _phases(run), "evaluation_seconds": time.perf_counter() - began}


def _phases(run: Run) -> dict[str, Any]:
    """Last and best epoch of every phase on the held-out images; the last one is what is kept."""
    phases: dict[str, Any] = {}
    for row in read_log(run.log.path):
        entry = phases.setdefault(row["phase"], {"epochs": 0, "seconds": 0.0})
        entry |= {
            "epochs": row["epoch"],
            "seconds": entry["seconds"] + row["seconds"],
            "val_top1_last": row["val_top1"],
        }
        if row["val_top1"] is not None and row["val_top1"] > entry.get("val_top1_best", -1.0):
            entry |= {"val_top1_best": row["val_top1"], "best_epoch": row["epoch"]}
    return phases


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"train.device = {name!r} is no PyTorch device; write auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"train.device = {name!r}, and PyTorch sees no CUDA device here. Write auto or cpu.")
    return device

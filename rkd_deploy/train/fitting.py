"""`fit`: everything a recipe asks for, phase after phase (`plans.py`), into one run folder.

A phase whose weights are in the run folder is done and is loaded; the first one that is not goes on from the
checkpoint. The test images are used once, at the end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import ImageSet, Split, load_images, on_device
from rkd_deploy.errors import DataError, RecipeError
from rkd_deploy.models.cost import count
from rkd_deploy.recipe import Recipe
from rkd_deploy.serve.bench.accuracy import top1
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.storage import write_json
from rkd_deploy.train import networks
from rkd_deploy.train.checkpoint import load_tensors, load_weights, save_tensors
from rkd_deploy.train.evaluation import predictions
from rkd_deploy.train.interruption import StopRequest
from rkd_deploy.train.loop import Display, Phase, train_phase
from rkd_deploy.train.plans import Plan, Planner
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
    display = display or Silent()
    facts = networks.gather_facts(recipe, images, display.note)
    trainer = _Trainer(recipe, facts, images, device)  # loads the given weights, so that bad ones leave no run behind
    run = create_run(root, recipe)
    write_json(run.folder / "environment.json", provenance())
    write_json(run.folder / "facts.json", facts)
    return trainer.run(run, display)


def resume(run: Run, *, display: Display | None = None) -> Run:
    """Go on with an unfinished run where its checkpoint stands; a finished one is given back as it is."""
    if run.finished:
        return run
    recipe = run.recipe
    images = load_images(recipe.data, recipe.train.seed)
    if not (run.folder / "facts.json").exists():  # killed in its first moments
        write_json(run.folder / "environment.json", provenance())
        write_json(run.folder / "facts.json", networks.gather_facts(recipe, images, (display or Silent()).note))
    facts = run.read_json("facts.json")
    return _Trainer(recipe, facts, images, _device(recipe.train.device)).run(run, display or Silent())


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
        self.nets = networks.build_networks(recipe, facts, device)
        self.planner = Planner(recipe, facts, self.nets)
        self.planner.check()
        self.ready: dict[str, nn.Module] = {}
        self._load_given_weights()

    def run(self, run: Run, display: Display) -> Run:
        """Every phase that is not done yet, then the evaluation."""
        for name, module in self.ready.items():
            if not run.weights(name).exists():
                self._keep(run, name, module)
        with StopRequest() as stop:
            for plan in self.planner.plans(set(self.ready)):
                self._phase(plan, run, display, stop)
        run.checkpoint.unlink(missing_ok=True)  # before the run counts as finished: a kill in between leaves no rest
        write_json(run.metrics_path, self._metrics(run))
        return run

    def _phase(self, plan: Plan, run: Run, display: Display, stop: StopRequest) -> None:
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

    def _load_given_weights(self) -> None:
        recipe = self.recipe
        if recipe.student.checkpoint is not None and self.nets.given is None:
            raise RecipeError("student.checkpoint is set and student.baseline is false: set one of them otherwise.")
        for table, part, module in (
            ("teacher", "teacher", self.nets.teacher),
            ("student", "s0", self.nets.given),
        ):
            settings = getattr(recipe, table)
            if module is not None and settings.pretrained:
                complete = networks.load_published_weights(module, table, settings.name, self.facts)
                if complete and part == "teacher":  # S0's go on being trained: it is what S and A are compared with
                    self.ready[part] = module
                    self._check_sanity(module, table, f"{settings.name}, pretrained", True)
            checkpoint = settings.checkpoint
            if checkpoint is None or module is None:
                continue
            known = networks.load_given_weights(module, table, checkpoint, recipe, self.facts)
            self.ready[part] = module
            self._check_sanity(module, table, checkpoint, known)

    def _check_sanity(self, module: nn.Module, table: str, checkpoint: str, known: bool) -> None:
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
        for part in networks.parts_of(self.recipe):
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

"""`fit`: trains what a recipe asks for, phase after phase, into one run folder.

A phase (`phases.py`) whose weights are in the run folder is done and is loaded; the first one that is not goes on from
the checkpoint. The test images are used once, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkd_deploy.bench.machine import provenance
from rkd_deploy.data.loader import Loader, Normaliser, Share, train_loader
from rkd_deploy.data.sources import AnySplit, ImageSet, load_images, on_device
from rkd_deploy.errors import RecipeError, UsageError, shortened
from rkd_deploy.models.residual import with_norms
from rkd_deploy.recipe import Recipe, TrainRecipe
from rkd_deploy.signals import StopRequest
from rkd_deploy.storage import write_json
from rkd_deploy.train import networks
from rkd_deploy.train.curves import draw_curves
from rkd_deploy.train.display import Silent, with_tensorboard
from rkd_deploy.train.distributed import Group, process_group, restarted
from rkd_deploy.train.evaluation import evaluate, refuse_guessing, split_top1, teacher_warning
from rkd_deploy.train.facts import RunFacts, WeightsFacts
from rkd_deploy.train.log import read_epochs
from rkd_deploy.train.loop import Display, train_phase
from rkd_deploy.train.networks import Networks, Originals
from rkd_deploy.train.phases import PlannedPhase, Planner
from rkd_deploy.train.preparation import check_named_files, data_of, gather_facts
from rkd_deploy.train.runs import DEFAULT_ROOT, Run, RunLock, create_run, runs_of
from rkd_deploy.train.starting_weights import load_published_weights, load_weights_from
from rkd_deploy.train.state import Phase
from rkd_deploy.train.weights import load_tensors, load_weights, save_tensors


def fit(recipe: Recipe, *, root: Path = DEFAULT_ROOT, display: Display | None = None) -> Run:
    """Train what a recipe asks for.

    Under torchrun every process calls this, and only the first writes and shows anything (docs/guides/distributed.md).
    A command that torchrun or Slurm started again goes on with the run that it began.

    Args:
        recipe: What to train (`rkd_deploy.recipe`).
        root: The run folder is made in here.
        display: Shown to a person; default: nothing.

    Returns:
        The finished run.

    Raises:
        RkdError: What is wrong with the recipe, the data or a checkpoint; found before a run folder is made, where
            that can be.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(f"fit was given {shortened(recipe)} and takes a Recipe: read_recipe(path) gives one.")
    root = Path(root)
    with process_group() as group:
        if group.any(restarted()) and (
            begun := group.on_main(lambda: [run for run in runs_of(root, recipe) if not run.finished])
        ):
            return resume(begun[-1], display=display)
        device = _device(recipe.train, group)
        # First, because a slip in a path should not cost the minutes that reading a large set takes.
        group.on_main(lambda: check_named_files(recipe))
        images = _load_images(recipe, group)
        display = display or Silent()
        originals = _originals(recipe, images)
        # By one process: widths that come of a latency measured twice would differ from process to process.
        facts = group.on_main(lambda: gather_facts(recipe, images, originals, display.note))
        # Loads the named weights, so that bad ones leave no run behind.
        trainer = _Trainer(recipe, facts, originals, images, device, group, display.note)
        run = group.on_main(lambda: create_run(root, recipe))
        with _held(run, group):
            group.on_main(lambda: _write_facts(run, facts))
            return trainer.run(run, display)


def resume(run: Run, *, display: Display | None = None) -> Run:
    """Go on with an unfinished run where its checkpoint stands; a finished one is given back as it is."""
    with process_group() as group:
        if group.on_main(lambda: run.finished):  # without the lock, which a folder that is read-only by now refuses
            return run
        with _held(run, group):
            if group.on_main(lambda: run.finished):  # by another process, just now
                return run
            recipe = run.recipe
            images = _load_images(recipe, group, run)
            display = display or Silent()
            originals = _originals(recipe, images)
            facts = group.on_main(lambda: _facts(run, images, originals, display))
            trainer = _Trainer(recipe, facts, originals, images, _device(recipe.train, group), group, display.note)
            return trainer.run(run, display)


@contextmanager
def _held(run: Run, group: Group) -> Iterator[None]:
    """Keep other commands from training the run while the block runs; one lock for all processes of this command."""
    lock = RunLock(run)
    group.on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _load_images(recipe: Recipe, group: Group, run: Run | None = None) -> ImageSet:
    begun = run is not None and (run.folder / "facts.json").exists()
    data = group.on_main(lambda: run.facts.normalised(recipe.data) if run is not None and begun else data_of(recipe))
    if group.size > 1:  # the first one alone, so that data which are not there are downloaded once
        group.on_main(lambda: bool(load_images(data, recipe.train.seed)))
    return load_images(data, recipe.train.seed)


def _originals(recipe: Recipe, images: ImageSet) -> Originals:
    return networks.build_originals(recipe, len(images.classes), images.image_size)


def _facts(run: Run, images: ImageSet, originals: Originals, display: Display) -> RunFacts:
    if not (run.folder / "facts.json").exists():  # killed in its first moments
        _write_facts(run, gather_facts(run.recipe, images, originals, display.note))
    return run.facts


def _write_facts(run: Run, facts: RunFacts) -> None:
    write_json(run.folder / "environment.json", dataclasses.asdict(provenance()))
    write_json(run.folder / "facts.json", facts.to_json())


class _Trainer:
    """Holds the networks and the data of one `fit`."""

    def __init__(
        self,
        recipe: Recipe,
        facts: RunFacts,
        originals: Originals,
        images: ImageSet,
        device: torch.device,
        group: Group,
        note: Callable[[str], None],
    ) -> None:
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.recipe, self.facts, self.device, self.group = recipe, facts, device, group
        self.normalise = Normaliser(images.mean, images.std, device)
        self.train, self.val, self.test = (
            on_device(split, device) for split in (images.train, images.val, images.test)
        )
        self.nets = networks.build_networks(recipe, facts, originals, device)
        _check_pieces(recipe.train, len(self.train), group, self.nets)
        self.planner = Planner(recipe, facts, self.nets)
        self.planner.check()
        self.ready: dict[str, nn.Module] = {}
        self._load_starting_weights(note if group.rank == 0 else lambda text: None)

    def run(self, run: Run, display: Display) -> Run:
        """Train every phase that is not done yet, then evaluate; returns the finished run."""
        display = with_tensorboard(display, run, self.recipe.train) if self.group.rank == 0 else Silent()
        for name, module in self.ready.items():
            self.group.on_main(partial(self._keep_starting_weights, run, name, module))
        with StopRequest() as stop:
            for plan in self.planner.plans(set(self.ready)):
                self._phase(plan, run, display, stop)
        self.group.on_main(lambda: self._finish(run, display))
        return run

    def _phase(self, plan: PlannedPhase, run: Run, display: Display, stop: StopRequest) -> None:
        if not self.group.on_main(lambda: run.weights(plan.name).exists()):
            # A seed for each phase: a resumed run skips those that are done, and draws for this one what it would have.
            torch.manual_seed(networks.derived_seed(self.recipe.train.seed, plan.name))
            phase = Phase(plan.name, plan.method(), plan.product, plan.epochs, self._val_top1)
            how = self.recipe.train if plan.lr is None else replace(self.recipe.train, lr=plan.lr)
            average = train_phase(phase, self._loader(plan.name), how, run, display, stop, self.group)
            self.group.on_main(lambda: self._keep_phase(run, plan, average, display))
        # Also after training: statistics of batch norm are those of rank 0 on all of them, and what ships is built on.
        state, _ = self.group.on_main(lambda: load_tensors(run.weights(plan.name)))
        load_weights(plan.product, with_norms(state, plan.product), str(run.weights(plan.name)), plan.name)

    def _loader(self, phase: str) -> Loader:
        return train_loader(
            self.recipe.data,
            self.train,
            self.normalise,
            classes=len(self.facts.classes),
            batch_size=self.recipe.train.batch_size,
            seed=networks.derived_seed(self.recipe.train.seed, phase),
            share=Share(self.group.rank, self.group.size),
        )

    def _load_starting_weights(self, note: Callable[[str], None]) -> None:
        recipe = self.recipe
        if recipe.student.checkpoint is not None and self.nets.s0 is None:
            raise RecipeError("student.checkpoint is set and student.baseline is false: set one of them otherwise.")
        for table, part, module in (
            ("teacher", "teacher", self.nets.teacher),
            ("student", "s0", self.nets.s0),
        ):
            settings = getattr(recipe, table)
            if module is not None and settings.pretrained:
                complete = load_published_weights(module, table, settings.name, self.facts)
                if complete and part == "teacher":  # S0's go on being trained: it is what S and A are compared with
                    self.ready[part] = module
                    self._check_sanity(module, table, f"{settings.name}, pretrained", True)
            checkpoint = settings.checkpoint
            if checkpoint is None or module is None:
                continue
            known = load_weights_from(module, table, checkpoint, recipe, self.facts, note)
            self.ready[part] = module
            self._check_sanity(module, table, checkpoint, known)

    def _check_sanity(self, module: nn.Module, table: str, checkpoint: str, known: bool) -> None:
        # A thousand images tell a network that guesses from one that knows; where none are held out, those it learnt.
        split = self.val or self.train
        split = split.take(torch.arange(min(1000, len(split))))
        refuse_guessing(f"{table} {checkpoint}", self._top1(module, split, name=table), len(split), self.facts, known)

    def _val_top1(self, module: nn.Module | None) -> float | None:
        if module is None or not len(self.val):
            return None
        return self._top1(module, self.val)

    def _top1(self, module: nn.Module, split: AnySplit, name: str | None = None) -> float:
        return split_top1(module, split, self.normalise, name)

    def _keep_starting_weights(self, run: Run, name: str, module: nn.Module) -> None:
        if not run.weights(name).exists():
            self._keep(run, name, module.state_dict())

    def _keep_phase(
        self, run: Run, plan: PlannedPhase, average: dict[str, torch.Tensor] | None, display: Display
    ) -> None:
        """Write the weights of a finished phase: those that ship last, because a phase that has them is done."""
        last = plan.product.state_dict()
        if average is not None:
            ships, other = (average, last) if self.recipe.train.ship == "ema" else (last, average)
            self._keep(run, f"{plan.name}_{networks.other_weights(self.recipe)}", other)
            last = ships
        draw_curves(run, self.recipe)
        if plan.name == "teacher":
            self._warn_of_guessing(run, display)
        self._keep(run, plan.name, last)

    def _warn_of_guessing(self, run: Run, display: Display) -> None:
        last_epoch = read_epochs(run.log.path)[-1]
        if warning := teacher_warning(last_epoch, len(self.val), self.facts.classes, self.recipe):
            run.log.append("warning", **warning)
            display.note(f"Warning: {warning['text']}")

    def _keep(self, run: Run, name: str, state: Mapping[str, torch.Tensor]) -> None:
        facts = WeightsFacts(network=name, classes=self.facts.classes, mean=self.facts.mean, std=self.facts.std)
        save_tensors(run.weights(name), state, dataclasses.asdict(facts))

    def _finish(self, run: Run, display: Display) -> None:
        run.checkpoint.unlink(missing_ok=True)  # before the run counts as finished: a kill in between leaves no rest
        metrics = evaluate(run, self.test, self.normalise, self.device, display)
        write_json(run.metrics_path, metrics.to_json())


def _device(recipe: TrainRecipe, group: Group) -> torch.device:
    """The device of this process.

    Raises:
        RecipeError: No such device; or the recipe asks for what only CUDA does, on another.
    """
    name = recipe.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{group.local_rank}" if group.size > 1 else "cuda"
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise RecipeError(f"train.device = {name!r} is no PyTorch device; write auto, cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"train.device = {name!r}: training runs on cpu and cuda. Write auto, cpu, cuda or cuda:1.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"train.device = {name!r}, and PyTorch sees no CUDA device here. Write auto or cpu.")
    if device.type == "cuda" and group.size > 1:
        torch.cuda.set_device(device)  # else every process takes memory on GPU 0 too, for a context of its own there
    _check_device(recipe, device, group)
    return device


def _check_device(recipe: TrainRecipe, device: torch.device, group: Group) -> None:
    for key in ("cuda_graphs", "sync_batchnorm"):
        if getattr(recipe, key) and device.type != "cuda" and (key == "cuda_graphs" or group.size > 1):
            raise RecipeError(f"train.{key} = true works on CUDA only, and this runs on {device.type}. Leave it out.")
    if recipe.cuda_graphs and group.size > 1:
        raise RecipeError(f"train.cuda_graphs = true is for one process, and there are {group.size}. Leave it out.")


def _check_pieces(recipe: TrainRecipe, images: int, group: Group, nets: Networks) -> None:
    """Refuse batches that cannot be cut into pieces, or into pieces too small for batch norm.

    Raises:
        RecipeError: The batch is no multiple of the pieces, or a piece is one image and a network has batch norm.
    """
    pieces, batch = group.size * recipe.accumulate, min(recipe.batch_size, images)
    if batch % pieces:
        raise RecipeError(
            f"train.batch_size = {batch} counts the images of all processes: {group.size} processes with "
            f"train.accumulate = {recipe.accumulate} need a multiple of {pieces}."
        )
    trained = (nets.teacher, nets.s0, nets.model, nets.control)
    norms = (m for net in trained if net is not None for m in net.modules() if isinstance(m, _BatchNorm))
    # The variance of one value is nothing: PyTorch refuses it where maps are 1 x 1, and else normalises image by image.
    if batch == pieces and not recipe.sync_batchnorm and next(norms, None) is not None:
        raise RecipeError(
            f"train.batch_size = {batch} in {pieces} pieces (processes times train.accumulate = {recipe.accumulate}) "
            f"leaves one image in each, and batch norm needs two or more. Set train.batch_size to {2 * pieces} or "
            "more, or train.accumulate to less."
        )
